/* Neutrons in a bare slab and what they beget, one energy group. */

#include <rfm_call.h>
#include <math.h>
#include <stddef.h>

#define GAMMA UINT64_C(0x9e3779b97f4a7c15)

enum { NU, FISSION, SCATTER, TOTAL, HALF, HISTORIES, SKIPPED, GENERATIONS,
       PARAMS };

/* What a row of the output counts; transport.py has the same names. */
enum { NEUTRONS, COLLISIONS, LEAKS, CAPTURES, FISSIONS, ALL, CHILDREN, SPARE,
       TALLIES };

#define MOST_GENERATIONS 64
#define MOST_CHILDREN    8
/* Depth first: of each generation at most the siblings of one are waiting. */
#define DEPTH            (MOST_GENERATIONS * MOST_CHILDREN)

struct neutron {
    double   x;
    uint64_t state;
    uint64_t generation;
};

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* The next number of a stream, in [0, 1). */
static double draw(uint64_t *state)
{
    *state += GAMMA;
    return (double)(mix(*state) >> 11) * 0x1p-53;
}

/* One history: a neutron and all that descends from it. */
static void family(const double *p, uint64_t state, uint64_t skipped,
                   uint64_t generations, int64_t *tally)
{
    const double scattered = p[SCATTER] / p[TOTAL];
    const double split     = (p[SCATTER] + p[FISSION]) / p[TOTAL];
    struct neutron waiting[DEPTH];
    uint64_t depth = 1;

    waiting[0].x          = p[HALF] * (2.0 * draw(&state) - 1.0);
    waiting[0].state      = state;
    waiting[0].generation = 0;
    while (depth > 0) {
        const struct neutron born = waiting[--depth];
        const int64_t active      = born.generation >= skipped;
        double x                  = born.x;

        state = born.state;
        tally[ALL]++;
        tally[NEUTRONS] += active;
        for (;;) {
            const double mu = 2.0 * draw(&state) - 1.0;
            double u;

            x += mu * (-log(1.0 - draw(&state)) / p[TOTAL]);
            if (!(fabs(x) <= p[HALF])) {
                tally[LEAKS]++;
                break;
            }
            tally[COLLISIONS] += active;
            u = draw(&state);
            if (u < scattered) {
                continue;
            }
            if (u < split) {
                const uint64_t children = (uint64_t)(p[NU] + draw(&state));

                tally[FISSIONS]++;
                tally[CHILDREN] += (int64_t)children;
                for (uint64_t i = 0; i < children; i++) {
                    state += GAMMA;
                    if (born.generation + 1 < generations) {
                        waiting[depth].x          = x;
                        waiting[depth].state      = mix(state);
                        waiting[depth].generation = born.generation + 1;
                        depth++;
                    }
                }
            } else {
                tally[CAPTURES]++;
            }
            break;
        }
    }
}

/*
 * inputs: parameters, float64[PARAMS]; the round's key, uint64; which of all
 * rows the rank's first one is, int64; which of the rank's rows is the first
 * one wanted, int64. output: tallies of those rows, int64[count][TALLIES].
 */
int32_t transport_families(const struct rfm_call *call)
{
    const double *p;
    int64_t *tallies;
    uint64_t key;
    uint64_t row;
    uint64_t count;
    uint64_t histories;

    if ((call->n_in != 4) || (call->n_out != 1) ||
        (call->inputs[0].size != PARAMS * sizeof(*p)) ||
        (call->inputs[1].size != sizeof(key)) ||
        (call->inputs[2].size != sizeof(row)) ||
        (call->inputs[3].size != sizeof(row))) {
        return -1;
    }
    p = call->inputs[0].ptr;
    if (!(p[HISTORIES] >= 0.0) || !(p[HISTORIES] <= 0x1p32) ||
        !(p[SKIPPED] >= 0.0) || !(p[GENERATIONS] > p[SKIPPED]) ||
        !(p[GENERATIONS] <= MOST_GENERATIONS) || !(p[NU] >= 0.0) ||
        !(p[NU] <= MOST_CHILDREN - 1)) {
        return -2;
    }
    key       = *(const uint64_t *)call->inputs[1].ptr;
    row       = *(const uint64_t *)call->inputs[2].ptr +
                *(const uint64_t *)call->inputs[3].ptr;
    histories = (uint64_t)p[HISTORIES];
    tallies   = call->outputs[0].ptr;
    count     = call->outputs[0].capacity / (TALLIES * sizeof(*tallies));
    for (uint64_t i = 0; i < count; i++) {
        int64_t sums[TALLIES] = {0};

        for (uint64_t j = 1; j <= histories; j++) {
            const uint64_t number = (row + i) * histories + j;

            family(p, mix(key + GAMMA * number), (uint64_t)p[SKIPPED],
                   (uint64_t)p[GENERATIONS], sums);
        }
        for (uint64_t k = 0; k < TALLIES; k++) {
            tallies[i * TALLIES + k] = sums[k];
        }
    }
    call->outputs[0].size = count * TALLIES * sizeof(*tallies);
    return 0;
}
