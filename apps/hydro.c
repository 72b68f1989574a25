/*
 * A step of Lagrangian hydrodynamics on hexahedra: the forces of elements on
 * their nodes, and how the nodes move.
 *
 * Elements and nodes lie in rows along z; rows of a plane lie side by side. A
 * plane of ny * nz elements has two rows more, and each row of forces two
 * columns more, for what neighbours send. Corner c of an element is its node
 * (c >> 2, c >> 1 & 1, c & 1).
 */

#include <math.h>
#include <rfm_call.h>
#include <stddef.h>
#include <string.h>

#define CORNERS 8
#define AXES 3
#define FORCES (CORNERS * AXES)
#define MODES 4
#define SIZES 3
/* Elements that are computed side by side: all they need is in the L1 cache. */
#define LANES 16

/* Of the gas. These numbers are those of hydro.py. */
#define GAMMA 1.4
/* Viscosity: by a shock's jump, and by the speed of sound. */
#define QUADRATIC 1.2
#define LINEAR 0.5
/* Resistance to motion that changes no volume, and no pressure resists. */
#define HOURGLASS 0.03
/* The part of an element that a signal may cross in a step. */
#define COURANT 0.4
/* The part by which its volume may change. */
#define SWELLING 0.1
/*
 * A jump that is none. The gas ahead of the shock would feel it, ever less, and
 * numbers so small that they lose digits take the processor much longer.
 */
#define STILL 1e-30
#define TINY 1e-200

typedef double lanes[LANES];

struct elements {
    lanes x[CORNERS][AXES]; /* half a step on, as seen from corner 0 */
    lanes v[CORNERS][AXES];
    lanes b[CORNERS][AXES]; /* 12 times the volume's change with x */
    lanes side[AXES][AXES]; /* 4 times the mean edges */
    lanes bent[MODES][AXES];
    lanes bending[MODES][AXES];
    lanes growing[AXES][AXES];
    lanes gradient[AXES][AXES]; /* of v, times 12 volumes */
    lanes stress[AXES][AXES];
    lanes volume;
    lanes section; /* the largest one's square, times 256 */
    lanes length;  /* the shortest way across */
    lanes sound;
    lanes damping;
};

/* The corners of each face: anticlockwise, as seen from outside. */
static const int faces[2 * AXES][4] = {
    {4, 6, 7, 5}, {0, 1, 3, 2}, {2, 3, 7, 6},
    {0, 4, 5, 1}, {1, 5, 7, 3}, {0, 2, 6, 4},
};

/*
 * The volume between a face and corner 0, by what it changes with: a face is
 * bilinear, so that this is the mean of the two ways to cut it into triangles.
 */
static void add_face(struct elements *e, const int *face)
{
    for (int i = 0; i < AXES; i++) {
        const int j     = (i + 1) % AXES;
        const int k     = (i + 2) % AXES;
        const double *const restrict p = e->x[face[0]][j];
        const double *const restrict q = e->x[face[1]][j];
        const double *const restrict r = e->x[face[2]][j];
        const double *const restrict s = e->x[face[3]][j];
        const double *const restrict t = e->x[face[0]][k];
        const double *const restrict u = e->x[face[1]][k];
        const double *const restrict v = e->x[face[2]][k];
        const double *const restrict w = e->x[face[3]][k];
        double *const restrict a       = e->b[face[0]][i];
        double *const restrict b       = e->b[face[1]][i];
        double *const restrict c       = e->b[face[2]][i];
        double *const restrict d       = e->b[face[3]][i];

        for (int l = 0; l < LANES; l++) {
            const double ey = p[l] + q[l];
            const double ez = t[l] + u[l];
            const double fy = r[l] - p[l];
            const double fz = v[l] - t[l];
            const double gy = s[l] - q[l];
            const double gz = w[l] - u[l];
            const double n  = fy * gz - fz * gy;
            const double f  = ey * fz - ez * fy;
            const double g  = ey * gz - ez * gy;

            a[l] += n + g;
            b[l] += n - f;
            c[l] -= g;
            d[l] += f;
        }
    }
}

/*
 * What a quantity at the corners is made of, but for its mean: three parts that
 * grow along an axis, and four that bend.
 */
static void take_apart(lanes (*restrict values)[AXES],
                       lanes (*restrict linear)[AXES],
                       lanes (*restrict bent)[AXES])
{
    for (int i = 0; i < AXES; i++) {
        for (int l = 0; l < LANES; l++) {
            const double s0 = values[1][i][l] + values[0][i][l];
            const double s1 = values[3][i][l] + values[2][i][l];
            const double s2 = values[5][i][l] + values[4][i][l];
            const double s3 = values[7][i][l] + values[6][i][l];
            const double d0 = values[1][i][l] - values[0][i][l];
            const double d1 = values[3][i][l] - values[2][i][l];
            const double d2 = values[5][i][l] - values[4][i][l];
            const double d3 = values[7][i][l] - values[6][i][l];

            linear[0][i][l] = (s3 - s1) + (s2 - s0);
            linear[1][i][l] = (s3 - s2) + (s1 - s0);
            linear[2][i][l] = (d3 + d2) + (d1 + d0);
            bent[0][i][l]   = (s3 - s2) - (s1 - s0); /* xy */
            bent[1][i][l]   = (d3 - d2) + (d1 - d0); /* yz */
            bent[2][i][l]   = (d3 + d2) - (d1 + d0); /* xz */
            bent[3][i][l]   = (d3 - d2) - (d1 - d0); /* xyz */
        }
    }
}

/* The largest section through an element, by its mean edges. */
static void find_section(struct elements *e)
{
    for (int axis = 0; axis < AXES; axis++) {
        lanes *const p = e->side[axis];
        lanes *const q = e->side[(axis + 1) % AXES];

        for (int l = 0; l < LANES; l++) {
            const double x = p[1][l] * q[2][l] - p[2][l] * q[1][l];
            const double y = p[2][l] * q[0][l] - p[0][l] * q[2][l];
            const double z = p[0][l] * q[1][l] - p[1][l] * q[0][l];
            const double s = x * x + y * y + z * z;

            e->section[l] = (s > e->section[l]) ? s : e->section[l];
        }
    }
}

/* The volume, and the gradient of v. */
static void find_motion(struct elements *e)
{
    for (int c = 0; c < CORNERS; c++) {
        for (int i = 0; i < AXES; i++) {
            for (int l = 0; l < LANES; l++) {
                const double b = e->b[c][i][l];

                /* It is of third degree in x. */
                e->volume[l] += b * e->x[c][i][l] * (1.0 / 36.0);
                e->gradient[i][0][l] += b * e->v[c][0][l];
                e->gradient[i][1][l] += b * e->v[c][1][l];
                e->gradient[i][2][l] += b * e->v[c][2][l];
            }
        }
    }
}

/*
 * What elements' energy, mass and motion make of them: pressure and viscosity,
 * half a step on, and which step they allow next.
 */
static void find_stress(struct elements *e, double dt, const double *mass,
                        const double *energy, double *density, double *limit)
{
    for (int l = 0; l < LANES; l++) {
        e->length[l] = 16.0 * e->volume[l] / sqrt(e->section[l]);
        e->sound[l]  = sqrt((energy[l] > 0.0) ? energy[l] : 0.0);
    }
    for (int l = 0; l < LANES; l++) {
        const double volume = e->volume[l];
        const double change = (e->gradient[0][0][l] + e->gradient[1][1][l] +
                               e->gradient[2][2][l]) / (12.0 * volume);
        const double rho    = mass[l] / volume;
        const double inner  = (energy[l] > 0.0) ? energy[l] : 0.0;
        const double half   = 1.0 - 0.5 * dt * (GAMMA - 1.0) * change;
        /* sqrt(1.4 * 0.4), the speed of sound of a unit of energy. */
        const double sound  = 0.74833147735478827712 * e->sound[l];
        const double fall   = -change * e->length[l];
        const double jump   = (fall > STILL) ? fall : 0.0;
        const double brake  = QUADRATIC * jump + LINEAR * sound;
        const double size   = (change < 0.0) ? -change : change;
        const double fast   = (sound + 2.0 * brake) / (COURANT * e->length[l]);
        const double swell  = size * (1.0 / SWELLING);
        const double most   = (fast > swell) ? fast : swell;
        const double p =
            (GAMMA - 1.0) * rho * inner * half + rho * jump * brake;

        density[l]    = rho;
        limit[l]      = 1.0 / ((most > TINY) ? most : TINY);
        e->damping[l] = HOURGLASS * mass[l] * (sound + jump) / e->length[l];
        for (int i = 0; i < AXES; i++) {
            e->stress[i][i][l] = p * (1.0 / 12.0);
        }
    }
}

/* What bends beyond what the rest of the motion explains is resisted. */
static void resist(struct elements *e)
{
    for (int j = 0; j < AXES; j++) {
        for (int m = 0; m < MODES; m++) {
            for (int l = 0; l < LANES; l++) {
                const double linear = e->bent[m][0][l] * e->gradient[0][j][l] +
                                      e->bent[m][1][l] * e->gradient[1][j][l] +
                                      e->bent[m][2][l] * e->gradient[2][j][l];
                const double g = e->damping[l] * (e->bending[m][j][l] -
                                 linear / (12.0 * e->volume[l]));

                e->bending[m][j][l] = g;
            }
        }
        for (int i = 0; i < AXES; i++) {
            for (int l = 0; l < LANES; l++) {
                const double sum = e->bent[0][i][l] * e->bending[0][j][l] +
                                   e->bent[1][i][l] * e->bending[1][j][l] +
                                   e->bent[2][i][l] * e->bending[2][j][l] +
                                   e->bent[3][i][l] * e->bending[3][j][l];

                e->stress[i][j][l] += sum / (12.0 * e->volume[l]);
            }
        }
    }
}

/* Forces on the corners, each `stride` apart. */
static void find_forces(struct elements *e, uint64_t count, double *force,
                        uint64_t stride)
{
    for (int c = 0; c < CORNERS; c++) {
        const double xy  = ((c >> 2 ^ c >> 1) & 1) != 0 ? -1.0 : 1.0;
        const double yz  = ((c >> 1 ^ c) & 1) != 0 ? -1.0 : 1.0;
        const double xz  = xy * yz;
        const double xyz = (c & 1) != 0 ? xy : -xy;

        for (int j = 0; j < AXES; j++) {
            lanes sum;

            for (int l = 0; l < LANES; l++) {
                sum[l] = e->b[c][0][l] * e->stress[0][j][l] +
                         e->b[c][1][l] * e->stress[1][j][l] +
                         e->b[c][2][l] * e->stress[2][j][l] -
                         xy * e->bending[0][j][l] - yz * e->bending[1][j][l] -
                         xz * e->bending[2][j][l] - xyz * e->bending[3][j][l];
            }
            memcpy(force + (c * AXES + j) * stride, sum, count * sizeof(*sum));
        }
    }
}

/* Some values, and the last one again up to the end of the lanes. */
static void load(lanes to, const double *from, uint64_t count)
{
    memcpy(to, from, count * sizeof(*to));
    for (uint64_t l = count; l < LANES; l++) {
        to[l] = from[count - 1];
    }
}

struct row {
    const double *x; /* rows of nodes: [AXES][nz + 1] */
    const double *v;
    const double *v_before;
    const double *mass;
    const double *force_before; /* [FORCES][nz + 2], as force */
    const double *energy_before;
    double *force;
    double *energy;
    double *density;
    double dt_before;
    double dt;
    uint64_t ny;
    uint64_t nz;
};

/* Elements from `k` on of a row, at most LANES; the step that they allow. */
static double run_elements(struct elements *e, const struct row *r, uint64_t k,
                           uint64_t count)
{
    const uint64_t line = r->nz + 1;
    lanes mass;
    lanes work = {0.0};
    lanes energy;
    lanes density;
    lanes limit;
    double least = HUGE_VAL;

    for (uint64_t c = 0; c < CORNERS; c++) {
        const uint64_t node = (c >> 2) * (r->ny + 1) + (c >> 1 & 1);
        const uint64_t at   = node * AXES * line + k + (c & 1);

        for (uint64_t i = 0; i < AXES; i++) {
            lanes before;
            lanes force;

            load(e->x[c][i], r->x + at + i * line, count);
            load(e->v[c][i], r->v + at + i * line, count);
            load(before, r->v_before + at + i * line, count);
            load(force, r->force_before + (c * AXES + i) * (r->nz + 2) + k + 1,
                 count);
            for (int l = 0; l < LANES; l++) {
                work[l] += force[l] * (0.5 * (e->v[c][i][l] + before[l]));
                e->x[c][i][l] += 0.5 * r->dt * e->v[c][i][l];
            }
        }
    }
    for (int c = CORNERS - 1; c >= 0; c--) {
        for (int i = 0; i < AXES; i++) {
            for (int l = 0; l < LANES; l++) {
                e->x[c][i][l] -= e->x[0][i][l];
            }
        }
    }
    load(mass, r->mass + k, count);
    load(energy, r->energy_before + k, count);
    for (int l = 0; l < LANES; l++) {
        energy[l] -= r->dt_before * work[l] / mass[l];
    }
    memset(e->b, 0, sizeof(e->b));
    memset(e->gradient, 0, sizeof(e->gradient));
    memset(e->stress, 0, sizeof(e->stress));
    memset(e->volume, 0, sizeof(e->volume));
    memset(e->section, 0, sizeof(e->section));
    for (int face = 0; face < 2 * AXES; face++) {
        add_face(e, faces[face]);
    }
    take_apart(e->x, e->side, e->bent);
    take_apart(e->v, e->growing, e->bending);
    find_section(e);
    find_motion(e);
    find_stress(e, r->dt, mass, energy, density, limit);
    resist(e);
    find_forces(e, count, r->force + k + 1, r->nz + 2);
    memcpy(r->energy + k, energy, count * sizeof(*energy));
    memcpy(r->density + k, density, count * sizeof(*density));
    for (uint64_t l = 0; l < count; l++) {
        least = (limit[l] < least) ? limit[l] : least;
    }
    return least;
}

static int is_doubles(const struct rfm_buf *buf, uint64_t count)
{
    return buf->size == count * sizeof(double);
}

/* How many elements there are along x, y and z. */
static int read_sizes(const struct rfm_buf *buf, uint64_t *sizes)
{
    if (buf->size != SIZES * sizeof(*sizes)) {
        return -1;
    }
    memcpy(sizes, buf->ptr, SIZES * sizeof(*sizes));
    for (int i = 0; i < SIZES; i++) {
        if ((sizes[i] == 0) || (sizes[i] >= 1u << 16)) {
            return -1;
        }
    }
    return 0;
}

/*
 * inputs: x, v and v of the step before of all nodes, float64[nx + 1][ny + 1]
 * [3][nz + 1]; masses of all elements, float64[nx][ny + 2][nz]; how long the
 * step before and this one are, float64[2]; nx, ny and nz, int64; of the rows
 * of elements that are wanted: forces, float64[count][24][nz + 2], and energy,
 * float64[count][nz], of the step before; which the first of them is, int64.
 * outputs, of these rows: forces; energy; density, half a step on; and the
 * longest step that may follow, float64[count].
 *
 * An element's bits depend on no other element.
 */
int32_t hydro_elements(const struct rfm_call *call)
{
    const struct rfm_buf *in = call->inputs;
    struct rfm_buf *out      = call->outputs;
    struct elements e;
    struct row row;
    uint64_t sizes[SIZES];
    uint64_t nodes;
    uint64_t rows;
    uint64_t count;
    uint64_t first;

    if ((call->n_in != 9) || (call->n_out != 4) ||
        (read_sizes(&in[5], sizes) != 0) || !is_doubles(&in[4], 2) ||
        (in[8].size != sizeof(first))) {
        return -1;
    }
    row.ny = sizes[1];
    row.nz = sizes[2];
    nodes  = (sizes[0] + 1) * (row.ny + 1) * AXES * (row.nz + 1);
    rows   = sizes[0] * (row.ny + 2);
    first  = *(const uint64_t *)in[8].ptr;
    count  = out[3].capacity / sizeof(double);
    if (!is_doubles(&in[0], nodes) || !is_doubles(&in[1], nodes) ||
        !is_doubles(&in[2], nodes) || !is_doubles(&in[3], rows * row.nz) ||
        (count > rows) || (first > rows - count) ||
        !is_doubles(&in[6], count * FORCES * (row.nz + 2)) ||
        !is_doubles(&in[7], count * row.nz) ||
        (out[0].capacity < in[6].size) || (out[1].capacity < in[7].size) ||
        (out[2].capacity < in[7].size)) {
        return -2;
    }
    row.dt_before = ((const double *)in[4].ptr)[0];
    row.dt        = ((const double *)in[4].ptr)[1];
    for (uint64_t r = 0; r < count; r++) {
        const uint64_t i    = (first + r) / (row.ny + 2);
        const uint64_t j    = (first + r) % (row.ny + 2);
        const uint64_t node = (i * (row.ny + 1) + j - 1) * AXES * (row.nz + 1);
        double least        = HUGE_VAL;

        row.force   = (double *)out[0].ptr + r * FORCES * (row.nz + 2);
        row.energy  = (double *)out[1].ptr + r * row.nz;
        row.density = (double *)out[2].ptr + r * row.nz;
        if ((j == 0) || (j > row.ny)) {
            /* Nobody's, unless a neighbour sends what is there. */
            memset(row.force, 0, FORCES * (row.nz + 2) * sizeof(double));
            memset(row.energy, 0, row.nz * sizeof(double));
            memset(row.density, 0, row.nz * sizeof(double));
        } else {
            row.x        = (const double *)in[0].ptr + node;
            row.v        = (const double *)in[1].ptr + node;
            row.v_before = (const double *)in[2].ptr + node;
            row.mass     = (const double *)in[3].ptr + (first + r) * row.nz;
            row.force_before =
                (const double *)in[6].ptr + r * FORCES * (row.nz + 2);
            row.energy_before = (const double *)in[7].ptr + r * row.nz;
            for (uint64_t f = 0; f < FORCES; f++) {
                row.force[f * (row.nz + 2)]              = 0.0;
                row.force[f * (row.nz + 2) + row.nz + 1] = 0.0;
            }
            for (uint64_t k = 0; k < row.nz; k += LANES) {
                const uint64_t left = row.nz - k;
                const double most =
                    run_elements(&e, &row, k, (left < LANES) ? left : LANES);

                least = (most < least) ? most : least;
            }
        }
        ((double *)out[3].ptr)[r] = least;
    }
    out[0].size = in[6].size;
    out[1].size = in[7].size;
    out[2].size = in[7].size;
    out[3].size = count * sizeof(double);
    return 0;
}

/* Moves a row of nodes, along one axis, by the forces of eight elements. */
static void move(const double *const *force,
                 const double *restrict mobility, double dt, uint64_t count,
                 const double *restrict x, const double *restrict v,
                 double *restrict x_new, double *restrict v_new)
{
    for (uint64_t k = 0; k < count; k++) {
        const double sum =
            ((force[0][k] + force[1][k]) + (force[2][k] + force[3][k])) +
            ((force[4][k] + force[5][k]) + (force[6][k] + force[7][k]));
        const double after = v[k] + dt * mobility[k] * sum;

        x_new[k] = x[k] + dt * (0.5 * (v[k] + after));
        v_new[k] = after;
    }
}

/*
 * inputs: forces of all elements, and of those beyond the edges,
 * float64[nx + 2][ny + 2][24][nz + 2]; of all nodes, 1 / mass along each axis,
 * or 0 where a wall holds them, float64[nx + 1][ny + 1][3][nz + 1]; how long
 * the step before and this one are, float64[2]; nx, ny and nz, int64; of the
 * rows of nodes that are wanted: x and v, float64[count][3][nz + 1]; which the
 * first of them is, int64. outputs: x and v of these rows, a step later.
 *
 * A node's forces are added in the same order wherever it lies.
 */
int32_t hydro_nodes(const struct rfm_call *call)
{
    const struct rfm_buf *in = call->inputs;
    struct rfm_buf *out      = call->outputs;
    uint64_t sizes[SIZES];
    uint64_t line;
    uint64_t wide;
    uint64_t rows;
    uint64_t count;
    uint64_t first;
    double dt;

    if ((call->n_in != 7) || (call->n_out != 2) ||
        (read_sizes(&in[3], sizes) != 0) || !is_doubles(&in[2], 2) ||
        (in[6].size != sizeof(first))) {
        return -1;
    }
    line  = sizes[2] + 1;
    wide  = sizes[2] + 2;
    rows  = (sizes[0] + 1) * (sizes[1] + 1);
    first = *(const uint64_t *)in[6].ptr;
    count = in[4].size / (AXES * line * sizeof(double));
    if ((count > rows) || (first > rows - count) ||
        !is_doubles(&in[0], (sizes[0] + 2) * (sizes[1] + 2) * FORCES * wide) ||
        !is_doubles(&in[1], rows * AXES * line) ||
        !is_doubles(&in[4], count * AXES * line) ||
        !is_doubles(&in[5], count * AXES * line) ||
        (out[0].capacity < in[4].size) || (out[1].capacity < in[4].size)) {
        return -2;
    }
    dt = ((const double *)in[2].ptr)[1];
    for (uint64_t r = 0; r < count; r++) {
        const uint64_t i = (first + r) / (sizes[1] + 1);
        const uint64_t j = (first + r) % (sizes[1] + 1);

        for (uint64_t axis = 0; axis < AXES; axis++) {
            const double *force[CORNERS];
            const uint64_t at = (r * AXES + axis) * line;

            /* The node is corner 7 - c of the c-th element around it. */
            for (uint64_t c = 0; c < CORNERS; c++) {
                const uint64_t element =
                    (i + (c >> 2)) * (sizes[1] + 2) + j + (c >> 1 & 1);

                force[c] = (const double *)in[0].ptr +
                           (element * FORCES + (7 - c) * AXES + axis) * wide +
                           (c & 1);
            }
            move(force,
                 (const double *)in[1].ptr + (first * AXES * line) + at, dt,
                 line, (const double *)in[4].ptr + at,
                 (const double *)in[5].ptr + at, (double *)out[0].ptr + at,
                 (double *)out[1].ptr + at);
        }
    }
    out[0].size = in[4].size;
    out[1].size = in[4].size;
    return 0;
}
