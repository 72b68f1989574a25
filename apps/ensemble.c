/* Pendulums, each for a while of its own: their periods, by a symplectic method. */

#include <rfm_call.h>
#include <math.h>
#include <stddef.h>

/* What a row of the inputs and of the output is; ensemble.py has the same names. */
enum { GRAVITY, STEPS, A_PERIOD, PARAMS };
enum { AMPLITUDE, LENGTH, MEMBER };
enum { OF_AMPLITUDE, OF_LENGTH, OF_GRAVITY, PERIOD, DRIFT, ANGLE, VELOCITY,
       SWINGS, RESULTS };

/* Omelyan, Mryglod and Folk: of fourth order, four forces in a step. */
#define XI     0.1786178958448091
#define LAMBDA (-0.2123418310626054)
#define CHI    (-0.06626458266981849)

#define TWO_PI 6.283185307179586

/* Newton's method; each round about triples the digits. */
#define ROUNDS 3

struct pendulum {
    double angle;
    double velocity;
    double time;
};

static void step(struct pendulum *p, double pull, double h)
{
    const double outer = (0.5 - LAMBDA) * h * pull;
    const double inner = LAMBDA * h * pull;

    p->angle    += XI * h * p->velocity;
    p->velocity -= outer * sin(p->angle);
    p->angle    += CHI * h * p->velocity;
    p->velocity -= inner * sin(p->angle);
    p->angle    += (1.0 - 2.0 * (CHI + XI)) * h * p->velocity;
    p->velocity -= inner * sin(p->angle);
    p->angle    += CHI * h * p->velocity;
    p->velocity -= outer * sin(p->angle);
    p->angle    += XI * h * p->velocity;
}

/* When a pendulum that has just gone through its lowest point was there. */
static double lowest(struct pendulum p, double pull)
{
    for (int i = 0; i < ROUNDS; i++) {
        const double h = -p.angle / p.velocity;

        step(&p, pull, h);
        p.time += h;
    }
    return p.time;
}

static void swing(const double *params, const double *member, double *out)
{
    const double pull    = params[GRAVITY] / member[LENGTH];
    const double h       = TWO_PI / (params[A_PERIOD] * sqrt(pull));
    const double energy  = -cos(member[AMPLITUDE]);
    const uint64_t steps = (uint64_t)params[STEPS];
    struct pendulum p    = {member[AMPLITUDE], 0.0, 0.0};
    struct pendulum first = p;
    struct pendulum last  = p;
    double drift          = 0.0;
    uint64_t passed       = 0;

    for (uint64_t i = 1; i <= steps; i++) {
        const double before = p.angle;
        double off;

        step(&p, pull, h);
        p.time = (double)i * h;
        off    = fabs(p.velocity * p.velocity / (2.0 * pull) -
                      cos(p.angle) - energy);
        drift  = (off > drift) ? off : drift;
        if ((before < 0.0) && (p.angle >= 0.0)) {
            first = (passed == 0) ? p : first;
            last  = p;
            passed++;
        }
    }
    out[OF_AMPLITUDE] = member[AMPLITUDE];
    out[OF_LENGTH]    = member[LENGTH];
    out[OF_GRAVITY]   = params[GRAVITY];
    out[PERIOD]       = (lowest(last, pull) - lowest(first, pull)) /
                        ((double)passed - 1.0);
    out[DRIFT]        = drift;
    out[ANGLE]        = p.angle;
    out[VELOCITY]     = p.velocity;
    out[SWINGS]       = (double)passed;
}

/*
 * inputs: parameters, float64[PARAMS]; members, float64[count][MEMBER].
 * output: their results, float64[count][RESULTS].
 */
int32_t ensemble_swings(const struct rfm_call *call)
{
    const double *params;
    const double *members;
    double *results;
    uint64_t count;

    if ((call->n_in != 2) || (call->n_out != 1) ||
        (call->inputs[0].size != PARAMS * sizeof(*params))) {
        return -1;
    }
    params  = call->inputs[0].ptr;
    members = call->inputs[1].ptr;
    results = call->outputs[0].ptr;
    count   = call->inputs[1].size / (MEMBER * sizeof(*members));
    if (!(params[STEPS] >= 0.0) || !(params[STEPS] <= 0x1p32) ||
        (call->outputs[0].capacity < count * RESULTS * sizeof(*results))) {
        return -2;
    }
    for (uint64_t i = 0; i < count; i++) {
        swing(params, members + i * MEMBER, results + i * RESULTS);
    }
    call->outputs[0].size = count * RESULTS * sizeof(*results);
    return 0;
}
