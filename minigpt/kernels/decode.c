/* New tokens of a batch of sequences through a GPT, whose keys and values are kept: what GPT.forward
   computes with a KVCache, in one call. At one token a step PyTorch's hundred small operators cost more
   than the arithmetic.

   decode.py compiles this file once, where there is a C compiler, and fills the structs. Weights are
   float32 or bfloat16, and so are keys and values; everything is computed in float32. Vectors are
   those of GCC and Clang, so that one source serves AVX2, AVX-512 and NEON. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
const int32_t threaded = 1;
#else
const int32_t threaded = 0;
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define WIDE (2 * LANES) /* columns of a matrix that lie together: bfloat16 are read two by two */
#define PANEL 32 /* tokens of a block of keys and values; a matrix has columns for whole panels */
#define ROWS 6   /* rows that are multiplied at once: as many sums as there are registers for */
#define SUMS 12  /* vectors of them */
#define OWN_ROWS 4 /* or more for each thread, and each has its own */
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define ALONE static __attribute__((noinline)) /* its loops get registers of their own */

/* may_alias: they are read from where floats, or two bfloat16 beside each other, were written. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
enum kind { FLOAT32, BFLOAT16 };
enum then { SET, ADD, GELU };

typedef struct { const void *weight; const float *bias; int32_t in, out; } matrix;
typedef struct { const float *weight, *bias; } norm;
typedef struct { norm norm1; matrix qkv, out; norm norm2; matrix up, down; } layer;
typedef struct {
    int32_t vocab_size, d_model, n_layers, n_heads, d_ff, kind;
    float eps;
    const float *embedding, *positions; /* (V, d), scaled; (context, d) */
    norm final_norm;
    matrix lm_head;
    const layer *layers;
} model;
typedef struct {
    int32_t rows, capacity, threads; /* rows: sequences, B; capacity: tokens, in whole panels */
    const int32_t *starts;           /* (B + 1,) where the new tokens of each row begin, of N */
    const int64_t *ids, *positions;  /* (N,) the new tokens, and their positions in their rows */
    void *const *blocks; /* PANEL tokens each: (L, B) keys (nh, dk, PANEL), values (nh, PANEL, dk) */
    float *x, *normed;   /* (N, d); the same, or of few rows for each thread: see `run` */
    float *qkv, *mixed, *up; /* (N, 3 d), (N, d), (N, d_ff) */
    float *scores, *outputs; /* (threads, nh, capacity), (threads, nh, dk in whole panels) */
    float *logits;           /* (B, V) where each row has one token; or null */
} batch;

const int32_t lanes = LANES;

/* ------------------------------------------------------------------------------- vectors */

INLINE vec pick(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

/* Two vectors of elements i, i + 1, …; of bfloat16 the even ones and the odd ones. */
INLINE void load(enum kind kind, const void *from, size_t i, vec *a, vec *b) {
    if (kind == FLOAT32) {
        *a = *(const vec *)((const float *)from + i);
        *b = *(const vec *)((const float *)from + i + LANES);
    } else {
        ivec both = *(const ivec *)((const uint16_t *)from + i);
        *a = (vec)(both << 16);
        *b = (vec)(both & (int32_t)0xffff0000);
    }
}

/* What `load` has put apart, in its order again. */
INLINE void store(enum kind kind, float *to, vec a, vec b) {
    if (kind == FLOAT32) {
        *(vec *)to = a;
        *(vec *)(to + LANES) = b;
    } else {
        UNROLL for (int l = 0; l < LANES; l++) { to[2 * l] = a[l]; to[2 * l + 1] = b[l]; }
    }
}

INLINE void put(enum kind kind, void *to, size_t i, float value) {
    if (kind == FLOAT32) {
        ((float *)to)[i] = value;
    } else { /* to the nearest, ties to even */
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)to)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

/* e^x of x <= 0 to float32 rounding, 0 below -87: 2^n e^r with |r| <= ln 2 / 2, and e^r by Taylor's series. */
INLINE vec exponential(vec x) {
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to a whole number */
    ivec power = ((ivec)n + 127) << 23, tiny = x < -87.0f;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact */
    vec sum = 1.0f / 720 + r * (1.0f / 5040);
    sum = 1.0f / 120 + r * sum;
    sum = 1.0f / 24 + r * sum;
    sum = 1.0f / 6 + r * sum;
    sum = 0.5f + r * sum;
    sum = 1.0f + r * sum;
    sum = 1.0f + r * sum;
    return (vec)((ivec)(sum * (vec)power) & ~tiny);
}

/* x Φ(x); 1 - erf to 1.5e-7 by Abramowitz and Stegun 1964, 7.1.26. */
INLINE vec gelu(vec x) {
    vec z = (vec)((ivec)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    vec sum = 1.061405429f * t - 1.453152027f;
    sum = ((sum * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    vec tail = 0.5f * sum * t * exponential(-z * z); /* Φ(-|x|) */
    return x * pick(x < 0, tail, 1.0f - tail);
}

/* ------------------------------------------------------------------------------ products */

/* Σ_k x[r][k] w[k][c], k < in, of `rows` rows and `vecs` vectors of columns, in registers: vector
   r vecs + c of `sums`. Of few rows each sum is several, in turns, which need not wait for themselves. */
INLINE void multiply(int rows, int vecs, enum kind kind, int in, const float *x, size_t x_stride,
                     const void *w, size_t w_stride, vec sums[SUMS]) {
    int turns = rows * vecs <= 2 ? 4 : rows * vecs <= 6 ? 2 : 1, k = 0;
    UNROLL for (int s = 0; s < turns * rows * vecs; s++) sums[s] = (vec){0};
    for (; k + turns <= in; k += turns)
        UNROLL for (int t = 0; t < turns; t++) {
            vec columns[PANEL / LANES];
            UNROLL for (int c = 0; c < vecs; c += 2)
                load(kind, w, (k + t) * w_stride + c * LANES, &columns[c], &columns[c + 1]);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int c = 0; c < vecs; c++)
                    sums[(t * rows + r) * vecs + c] += x[r * x_stride + k + t] * columns[c];
        }
    for (; k < in; k++)
        for (int c = 0; c < vecs; c += 2) {
            vec a, b;
            load(kind, w, k * w_stride + c * LANES, &a, &b);
            UNROLL for (int r = 0; r < rows; r++) {
                sums[r * vecs + c] += x[r * x_stride + k] * a;
                sums[r * vecs + c + 1] += x[r * x_stride + k] * b;
            }
        }
    UNROLL for (int t = 1; t < turns; t++)
        UNROLL for (int s = 0; s < rows * vecs; s++) sums[s] += sums[t * rows * vecs + s];
}

/* WIDE columns from `column` on of some rows of a product. The weights are packed for `load`. */
INLINE void columns_of(int rows, enum kind kind, const matrix *m, int column, const float *x, float *y,
                       enum then then) {
    vec sums[SUMS];
    size_t start = (size_t)column * m->in * (kind == FLOAT32 ? 4 : 2);
    multiply(rows, 2, kind, m->in, x, m->in, (const char *)m->weight + start, WIDE, sums);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            int j = column + c * LANES;
            float *to = y + (size_t)r * m->out + j;
            vec sum = sums[r * 2 + c] + *(const vec *)(m->bias + j);
            if (then == GELU) sum = gelu(sum);
            if (j + LANES <= m->out) {
                if (then == ADD) sum += *(vec *)to;
                *(vec *)to = sum;
            } else
                for (int l = 0; j + l < m->out; l++) to[l] = then == ADD ? to[l] + sum[l] : sum[l];
        }
}

INLINE void product_of(enum kind kind, const matrix *m, int rows, const float *x, float *y,
                       enum then then, int part, int parts) {
    int panels = (m->out + PANEL - 1) / PANEL, groups = (rows + ROWS - 1) / ROWS;
    int end = panels * (part + 1) / parts * PANEL;
    for (int column = panels * part / parts * PANEL; column < end; column += WIDE)
        for (int g = 0; g < groups; g++) { /* of like size: few rows at once are slower */
            int r = (int64_t)rows * g / groups, next = (int64_t)rows * (g + 1) / groups;
            const float *from = x + (size_t)r * m->in;
            float *to = y + (size_t)r * m->out;
            switch (next - r) { /* constants, for which loops are unrolled */
                case 1: columns_of(1, kind, m, column, from, to, then); break;
                case 2: columns_of(2, kind, m, column, from, to, then); break;
                case 3: columns_of(3, kind, m, column, from, to, then); break;
                case 4: columns_of(4, kind, m, column, from, to, then); break;
                case 5: columns_of(5, kind, m, column, from, to, then); break;
                default: columns_of(ROWS, kind, m, column, from, to, then);
            }
        }
}

/* y (rows, out) = x (rows, in) W + bias; added to y, or its GELU; columns of one part of `parts`. */
ALONE void product(enum kind kind, const matrix *m, int rows, const float *x, float *y, enum then then,
                   int part, int parts) {
    if (kind == FLOAT32)
        product_of(FLOAT32, m, rows, x, y, then, part, parts);
    else
        product_of(BFLOAT16, m, rows, x, y, then, part, parts);
}

/* ---------------------------------------------------------------------- norm and attention */

static void layer_norm(norm n, float eps, int d, int rows, const float *x, float *y) {
    for (int r = 0; r < rows; r++, x += d, y += d) {
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < d; i++) sum += x[i];
        float mean = sum / d;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < d; i++) squares += (x[i] - mean) * (x[i] - mean);
        float factor = 1.0f / sqrtf(squares / d + eps);
        for (int i = 0; i < d; i++) y[i] = (x[i] - mean) * factor * n.weight[i] + n.bias[i];
    }
}

/* softmax(scale · scores) but for the division: by what is returned. */
INLINE float exponentials(float *scores, int length, float scale) {
    int end = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < end; t++) scores[t] = -INFINITY;
    vec most = *(vec *)scores, sums = {0};
    for (int t = LANES; t < end; t += LANES)
        most = pick(*(vec *)(scores + t) > most, *(vec *)(scores + t), most);
    float top = most[0], sum = 0;
    for (int l = 1; l < LANES; l++) top = most[l] > top ? most[l] : top;
    for (int t = 0; t < end; t += LANES)
        sums += *(vec *)(scores + t) = exponential((*(vec *)(scores + t) - top) * scale);
    for (int l = 0; l < LANES; l++) sum += sums[l];
    return sum;
}

/* What one thread works with: its heads of one layer, and where it writes. */
typedef struct { int first, end; float *scores, *outputs; } heads;

/* Keys and values of new token n of row r go to their block. */
INLINE void keep(enum kind kind, const model *m, const batch *b, heads h, size_t row, int n) {
    int d = m->d_model, dk = d / m->n_heads, position = b->positions[n] % PANEL; /* in its block */
    void *block = b->blocks[b->positions[n] / PANEL];
    for (int head = h.first; head < h.end; head++) {
        const float *k = b->qkv + (size_t)n * 3 * d + d + head * dk, *v = k + d;
        size_t keys = row + (size_t)head * dk * PANEL, values = keys + (size_t)d * PANEL;
        for (int i = 0; i < dk; i++) put(kind, block, values + position * dk + i, v[i]);
        for (int i = 0; i < dk; i++) put(kind, block, keys + i * PANEL + position, k[i]);
    }
}

/* New token n of row r looks at the row up to itself: its part of `mixed`. Block by block, all heads
   of each: what lies together is read together. Both products are of one row. */
INLINE void attend(enum kind kind, const model *m, const batch *b, heads h, size_t row, int n) {
    int d = m->d_model, dk = d / m->n_heads, length = b->positions[n] + 1;
    int width = (dk + PANEL - 1) / PANEL * PANEL; /* of `outputs` */
    size_t size = kind == FLOAT32 ? 4 : 2;
    vec sums[SUMS];
    for (int t = 0; t < length; t += PANEL) {
        const char *keys = (const char *)b->blocks[t / PANEL] + row * size;
        for (int head = h.first; head < h.end; head++) {
            multiply(1, PANEL / LANES, kind, dk, b->qkv + (size_t)n * 3 * d + head * dk, 0,
                     keys + (size_t)head * dk * PANEL * size, PANEL, sums);
            UNROLL for (int c = 0; c < PANEL / LANES; c += 2)
                store(kind, h.scores + (size_t)head * b->capacity + t + c * LANES, sums[c],
                      sums[c + 1]);
        }
    }
    for (int head = h.first; head < h.end; head++) {
        float *p = h.scores + (size_t)head * b->capacity;
        float factor = 1.0f / exponentials(p, length, 1.0f / sqrtf(dk));
        for (int t = 0; t < length; t++) p[t] *= factor;
    }
    memset(h.outputs + h.first * width, 0, (h.end - h.first) * width * sizeof(float));
    for (int t = 0; t < length; t += PANEL) {
        const char *values = (const char *)b->blocks[t / PANEL] + (row + (size_t)d * PANEL) * size;
        int tokens = length - t < PANEL ? length - t : PANEL;
        for (int head = h.first; head < h.end; head++)
            for (int j = 0; j < dk; j += PANEL) {
                multiply(1, PANEL / LANES, kind, tokens, h.scores + (size_t)head * b->capacity + t, 0,
                         values + ((size_t)head * dk * PANEL + j) * size, dk, sums);
                UNROLL for (int c = 0; c < PANEL / LANES; c++)
                    *(vec *)(h.outputs + head * width + j + c * LANES) += sums[c];
            }
    }
    for (int head = h.first; head < h.end; head++) {
        float *from = h.outputs + head * width, in_order[PANEL];
        for (int j = 0; j < dk; j += PANEL) {
            UNROLL for (int c = 0; c < PANEL; c += 2 * LANES)
                store(kind, in_order + c, *(vec *)(from + j + c), *(vec *)(from + j + c + LANES));
            int n_columns = dk - j < PANEL ? dk - j : PANEL;
            memcpy(b->mixed + (size_t)n * d + head * dk + j, in_order, n_columns * sizeof(float));
        }
    }
}

/* Keys and values of the new tokens of row r, and if `mix`, the output of attention for them. */
INLINE void attend_row_of(enum kind kind, const model *m, const batch *b, int l, int r, heads h, int mix) {
    int first = b->starts[r], end = b->starts[r + 1];
    size_t row = ((size_t)l * b->rows + r) * 2 * m->d_model * PANEL;
    for (int n = first; n < end; n++) keep(kind, m, b, h, row, n);
    if (!mix) return;
    /* Of many tokens head by head, whose keys and values stay in the nearest cache. */
    int step = end - first == 1 ? h.end - h.first : 1;
    for (int head = h.first; head < h.end; head += step)
        for (int n = first; n < end; n++)
            attend(kind, m, b, (heads){head, head + step, h.scores, h.outputs}, row, n);
}

ALONE void attend_row(const model *m, const batch *b, int l, int r, heads h, int mix) {
    if (m->kind == FLOAT32)
        attend_row_of(FLOAT32, m, b, l, r, h, mix);
    else
        attend_row_of(BFLOAT16, m, b, l, r, h, mix);
}

/* ---------------------------------------------------------------------------------- layers */

typedef struct {
    atomic_int arrived, round;
    pthread_mutex_t lock;
    pthread_cond_t next;
} barrier;

/* Wait until all n threads are here: some 20 μs awake, then asleep. OpenMP's own barrier sleeps at
   once where a process has more threads than cores, as a server has; waking up takes longer. */
static void wait_for_all(barrier *b, int n) {
    if (n == 1) return;
    int round = atomic_load(&b->round);
    if (atomic_fetch_add(&b->arrived, 1) == n - 1) {
        atomic_store(&b->arrived, 0);
        pthread_mutex_lock(&b->lock);
        atomic_store(&b->round, round + 1);
        pthread_cond_broadcast(&b->next);
        pthread_mutex_unlock(&b->lock);
        return;
    }
    for (int looks = 0; looks < 20000; looks++)
        if (atomic_load_explicit(&b->round, memory_order_acquire) != round) return;
    pthread_mutex_lock(&b->lock);
    while (atomic_load(&b->round) == round) pthread_cond_wait(&b->next, &b->lock);
    pthread_mutex_unlock(&b->lock);
}

/* Each thread has its own rows, or, of few rows, its own columns and heads of all of them. */
static void run(const model *m, const batch *b, barrier *all) {
    int me = omp_get_thread_num(), n_threads = omp_get_num_threads(), d = m->d_model;
    int by_rows = b->rows >= OWN_ROWS * n_threads, part = by_rows ? 0 : me, parts = by_rows ? 1 : n_threads;
    int row = by_rows ? b->rows * me / n_threads : 0;
    int rows = by_rows ? b->rows * (me + 1) / n_threads - row : b->rows;
    int first = b->starts[row], n = b->starts[row + rows] - first; /* of its tokens */
    float *x = b->x + (size_t)first * d, *mixed = b->mixed + (size_t)first * d;
    /* Each thread its own, also of columns: it need not wait for another. */
    float *normed = b->normed + (size_t)(by_rows ? first : me * n) * d;
    float *qkv = b->qkv + (size_t)first * 3 * d, *up = b->up + (size_t)first * m->d_ff;
    float *scores = b->scores + (size_t)me * m->n_heads * b->capacity;
    float *outputs = b->outputs + (size_t)me * m->n_heads * ((d / m->n_heads + PANEL - 1) / PANEL * PANEL);
    enum kind kind = m->kind;
    for (int i = n * part / parts; i < n * (part + 1) / parts; i++)
        for (int j = 0; j < d; j++)
            x[(size_t)i * d + j] = m->embedding[b->ids[first + i] * d + j]
                                 + m->positions[b->positions[first + i] * d + j];
    wait_for_all(all, parts);
    for (int l = 0; l < m->n_layers; l++) {
        const layer *w = &m->layers[l];
        int mix = b->logits || l + 1 < m->n_layers; /* else its keys and values are all there is */
        layer_norm(w->norm1, m->eps, d, n, x, normed);
        product(kind, &w->qkv, n, normed, qkv, SET, part, parts);
        wait_for_all(all, parts);
        int nh = m->n_heads, from = rows * nh * part / parts, to = rows * nh * (part + 1) / parts;
        for (int r = from / nh; r * nh < to; r++) {
            heads h = {from > r * nh ? from - r * nh : 0, to - r * nh < nh ? to - r * nh : nh, scores,
                       outputs};
            attend_row(m, b, l, row + r, h, mix);
        }
        if (!mix) return;
        wait_for_all(all, parts);
        product(kind, &w->out, n, mixed, x, ADD, part, parts);
        wait_for_all(all, parts);
        layer_norm(w->norm2, m->eps, d, n, x, normed);
        product(kind, &w->up, n, normed, up, GELU, part, parts);
        wait_for_all(all, parts);
        product(kind, &w->down, n, up, x, ADD, part, parts);
        wait_for_all(all, parts);
    }
    layer_norm(m->final_norm, m->eps, d, n, x, normed);
    product(kind, &m->lm_head, n, normed, b->logits + (size_t)first * m->vocab_size, SET, part,
            parts);
}

/* Returns 0, or -1 when an id is not in the vocabulary; nothing is computed then. */
int read_tokens(const model *m, const batch *b) {
    for (int i = 0; i < b->starts[b->rows]; i++)
        if (b->ids[i] < 0 || b->ids[i] >= m->vocab_size) return -1;
    barrier all = {0, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};
#pragma omp parallel num_threads(b->threads)
    run(m, b, &all);
    return 0;
}

/* ------------------------------------------------------------------------------- sampling */

/* The token at which the probabilities, summed in order, pass a point in [0, 1). p: the logits. */
static int64_t sample_one(float *p, int n, float temperature, float point) {
    float target = point * exponentials(p, n, 1.0f / temperature), sum = 0, before = 0;
    int block = 0;
    for (int i = 0; i < n && sum <= target; i += PANEL) {
        vec sums = {0};
        float more = 0;
        for (int j = 0; j < PANEL; j += LANES) sums += *(vec *)(p + i + j);
        for (int l = 0; l < LANES; l++) more += sums[l];
        if (more > 0) { block = i; before = sum; sum += more; }
    }
    int64_t token = block; /* rounding must not take it to one that cannot be: p > 0 */
    for (int i = block; i < block + PANEL && before <= target; i++)
        if (p[i] > 0) { token = i; before += p[i]; }
    return token;
}

/* A token for each of `rows` logits (rows, n); `scratch` is (threads, n + PANEL). */
void sample(int rows, int n, int threads, float temperature, const float *logits,
            const float *points, float *scratch, int64_t *ids) {
    (void)threads; /* without OpenMP there is one */
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        float *p = scratch + (size_t)omp_get_thread_num() * (n + PANEL);
        memcpy(p, logits + (size_t)r * n, n * sizeof(float));
        memset(p + n, 0, PANEL * sizeof(float));
        ids[r] = sample_one(p, n, temperature, points[r]);
    }
}
