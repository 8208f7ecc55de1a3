/* Decoding of a GPT: forward passes over the new tokens of a batch of sequences, with cached keys and
   values, and sampling of the next tokens. The results are those of GPT.forward with a KVCache, and of
   sampling.py. One call can run several steps. If a step decodes one token per sequence, calling the
   hundred small operators of PyTorch takes longer than the arithmetic.

   decode.py compiles this file once, if there is a C compiler, and fills the structs. Weights, keys
   and values are float32 or bfloat16; all arithmetic is in float32. The vector extensions of GCC and
   Clang let one source serve AVX2, AVX-512 and NEON.

   Letters in shapes: B sequences, N new tokens in all sequences together, L layers, d width, nh heads,
   hs head size, V vocabulary. */

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
#define WIDE (2 * LANES) /* columns stored together: one load gives two vectors of bfloat16 */
#define PANEL 32 /* tokens per block of keys and values; matrix columns are padded to multiples of it */
#define ROWS 6   /* rows multiplied at once: their sums just fit the registers */
#define SUMS 12  /* maximum number of vectors of sums in `multiply` */
#define MIN_SEQUENCES 4 /* from this many per thread, threads work on separate sequences */
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline)) /* so that its loops get registers of their own */

/* may_alias: vectors are loaded from memory that was written as floats or as pairs of bfloat16. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
enum kind { FLOAT32, BFLOAT16 };
enum epilogue { SET, ADD, GELU };

typedef struct { const void *weight; const float *bias; int32_t in, out; } matrix;
typedef struct { const float *weight, *bias; } norm;
typedef struct { norm norm1; matrix qkv, out; norm norm2; matrix up, down; } layer;
typedef struct {
    int32_t vocab_size, d_model, n_layers, n_heads, d_ff, kind;
    float eps;
    const float *embedding, *positions; /* (V, d), multiplied by the scale; (context, d) */
    norm final_norm;
    matrix lm_head;
    const layer *layers;
} model;
typedef struct {
    int32_t n_sequences, capacity, threads; /* B; capacity in tokens, a multiple of PANEL */
    const int32_t *starts;          /* (B + 1,) index of the first new token of each sequence, and N */
    const int64_t *ids, *positions; /* (N,) new tokens, and their positions in their sequences */
    void *const *blocks; /* each: for (L, B), keys (nh, hs, PANEL), then values (nh, PANEL, hs) */
    float *x, *normed;   /* (N, d); normed (threads, N, d) if threads share sequences: see `run` */
    float *qkv, *attended, *up; /* (N, 3 d), (N, d), (N, d_ff) */
    float *scores, *outputs; /* (threads, nh, capacity), (threads, nh, hs padded to PANEL) */
    float *logits;           /* (B, V), for one new token per sequence; null if not needed */
} batch; /* with a sampler, `positions` and `logits` have one such array per step; `ids` is for the first */
typedef struct {
    int32_t steps, vocab_size, n_tokens, end_of_text; /* ids from n_tokens on are never chosen */
    int32_t top_k;                      /* 0 means no filter; so do 0 in top_p and min_p */
    float temperature, top_p, min_p, penalty; /* temperature 0: take the most likely token */
    const float *points; /* (steps, B) uniform random numbers in [0, 1) */
    int64_t *ids;        /* (steps, B) the chosen tokens */
    uint8_t *seen;       /* (B, n_tokens) whether a token gets the penalty; or null for no penalty */
    uint8_t *ended;      /* (B,) whether a sequence has ended */
    float *scratch;      /* (threads, n_tokens + PANEL) */
} sampler;

const int32_t lanes = LANES;

/* ------------------------------------------------------------------------------- vectors */

INLINE vec blend(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

/* Load 2 LANES elements, from element i on, into two vectors. For float32, a gets the first half of the
   elements and b the second half; for bfloat16, a gets the even elements and b the odd ones. */
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

/* Store two vectors in the order that their elements had before `load` separated them. */
INLINE void store(enum kind kind, float *to, vec a, vec b) {
    if (kind == FLOAT32) {
        *(vec *)to = a;
        *(vec *)(to + LANES) = b;
    } else {
        UNROLL for (int l = 0; l < LANES; l++) { to[2 * l] = a[l]; to[2 * l + 1] = b[l]; }
    }
}

/* Write one value as element i. */
INLINE void put(enum kind kind, void *to, size_t i, float value) {
    if (kind == FLOAT32) {
        ((float *)to)[i] = value;
    } else { /* round to nearest, ties to even */
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)to)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

/* e^x for x <= 0, accurate to float32 rounding; 0 below -87. With x = n ln 2 + r and |r| <= ln 2 / 2,
   e^x is 2^n e^r. The Taylor series gives e^r. */
INLINE vec exponential(vec x) {
    vec n = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    ivec power = ((ivec)n + 127) << 23, tiny = x < -87.0f;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 as a sum of two parts, the first exact */
    vec sum = 1.0f / 720 + r * (1.0f / 5040);
    sum = 1.0f / 120 + r * sum;
    sum = 1.0f / 24 + r * sum;
    sum = 1.0f / 6 + r * sum;
    sum = 0.5f + r * sum;
    sum = 1.0f + r * sum;
    sum = 1.0f + r * sum;
    return (vec)((ivec)(sum * (vec)power) & ~tiny);
}

/* x Φ(x), with an error of at most 1.5e-7 in erf (Abramowitz and Stegun 1964, 7.1.26). */
INLINE vec gelu(vec x) {
    vec z = (vec)((ivec)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    vec sum = 1.061405429f * t - 1.453152027f;
    sum = ((sum * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    vec tail = 0.5f * sum * t * exponential(-z * z); /* Φ(-|x|) */
    return x * blend(x < 0, tail, 1.0f - tail);
}

/* ------------------------------------------------------------------------------ products */

/* Compute Σ_k x[r][k] w[k][c], k < in, in registers, for `rows` rows r and `vecs` vectors of columns.
   sums[r * vecs + v] is the result for row r and the vector of columns v. If there are few rows, each
   sum is split into partial sums, so that consecutive additions do not depend on each other. */
INLINE void multiply(int rows, int vecs, enum kind kind, int in, const float *x, size_t x_stride,
                     const void *w, size_t w_stride, vec sums[SUMS]) {
    int partials = rows * vecs <= 2 ? 4 : rows * vecs <= 6 ? 2 : 1, k = 0;
    UNROLL for (int s = 0; s < partials * rows * vecs; s++) sums[s] = (vec){0};
    for (; k + partials <= in; k += partials)
        UNROLL for (int t = 0; t < partials; t++) {
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
    UNROLL for (int t = 1; t < partials; t++)
        UNROLL for (int s = 0; s < rows * vecs; s++) sums[s] += sums[t * rows * vecs + s];
}

/* Compute WIDE columns of a product, beginning at `column`. `load` reads the packed weights. */
INLINE void columns_of(int rows, enum kind kind, const matrix *m, int column, const float *x, float *y,
                       enum epilogue epilogue) {
    vec sums[SUMS];
    size_t start = (size_t)column * m->in * (kind == FLOAT32 ? 4 : 2);
    multiply(rows, 2, kind, m->in, x, m->in, (const char *)m->weight + start, WIDE, sums);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            int j = column + c * LANES;
            float *to = y + (size_t)r * m->out + j;
            vec sum = sums[r * 2 + c] + *(const vec *)(m->bias + j);
            if (epilogue == GELU) sum = gelu(sum);
            if (j + LANES <= m->out) {
                if (epilogue == ADD) sum += *(vec *)to;
                *(vec *)to = sum;
            } else
                for (int l = 0; j + l < m->out; l++) to[l] = epilogue == ADD ? to[l] + sum[l] : sum[l];
        }
}

INLINE void product_of(enum kind kind, const matrix *m, int rows, const float *x, float *y,
                       enum epilogue epilogue, int part, int parts) {
    int panels = (m->out + PANEL - 1) / PANEL, groups = (rows + ROWS - 1) / ROWS;
    int end = panels * (part + 1) / parts * PANEL;
    for (int column = panels * part / parts * PANEL; column < end; column += WIDE)
        for (int g = 0; g < groups; g++) { /* about equal, because few rows at once are slower */
            int r = (int64_t)rows * g / groups, next = (int64_t)rows * (g + 1) / groups;
            const float *from = x + (size_t)r * m->in;
            float *to = y + (size_t)r * m->out;
            switch (next - r) { /* a constant number of rows lets the compiler unroll */
                case 1: columns_of(1, kind, m, column, from, to, epilogue); break;
                case 2: columns_of(2, kind, m, column, from, to, epilogue); break;
                case 3: columns_of(3, kind, m, column, from, to, epilogue); break;
                case 4: columns_of(4, kind, m, column, from, to, epilogue); break;
                case 5: columns_of(5, kind, m, column, from, to, epilogue); break;
                default: columns_of(ROWS, kind, m, column, from, to, epilogue);
            }
        }
}

/* Compute x (rows, in) W + bias for one of `parts` equal parts of the columns. Depending on `epilogue`,
   store the result in y (rows, out), add the result to y, or store the GELU of the result in y. */
NOINLINE void product(enum kind kind, const matrix *m, int rows, const float *x, float *y,
                      enum epilogue epilogue, int part, int parts) {
    if (kind == FLOAT32)
        product_of(FLOAT32, m, rows, x, y, epilogue, part, parts);
    else
        product_of(BFLOAT16, m, rows, x, y, epilogue, part, parts);
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

/* Replace scores by exp(scale · (scores - maximum)). Return their sum, the divisor of softmax. */
INLINE float exponentials(float *scores, int length, float scale) {
    int end = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < end; t++) scores[t] = -INFINITY;
    vec maximum = *(vec *)scores, sums = {0};
    for (int t = LANES; t < end; t += LANES)
        maximum = blend(*(vec *)(scores + t) > maximum, *(vec *)(scores + t), maximum);
    float top = maximum[0], sum = 0;
    for (int l = 1; l < LANES; l++) top = maximum[l] > top ? maximum[l] : top;
    for (int t = 0; t < end; t += LANES)
        sums += *(vec *)(scores + t) = exponential((*(vec *)(scores + t) - top) * scale);
    for (int l = 0; l < LANES; l++) sum += sums[l];
    return sum;
}

/* The heads of one layer that a thread computes, and the scratch memory of the thread. */
typedef struct { int first, end; float *scores, *outputs; } heads;

/* Write the keys and values of new token n to the block that contains its position. In each block, the
   keys and values of this layer and sequence begin at `offset`. */
INLINE void append_kv(enum kind kind, const model *m, const batch *b, heads h, size_t offset, int n) {
    int d = m->d_model, hs = d / m->n_heads, position = b->positions[n] % PANEL; /* within the block */
    void *block = b->blocks[b->positions[n] / PANEL];
    for (int head = h.first; head < h.end; head++) {
        const float *k = b->qkv + (size_t)n * 3 * d + d + head * hs, *v = k + d;
        size_t keys = offset + (size_t)head * hs * PANEL, values = keys + (size_t)d * PANEL;
        for (int i = 0; i < hs; i++) put(kind, block, values + position * hs + i, v[i]);
        for (int i = 0; i < hs; i++) put(kind, block, keys + i * PANEL + position, k[i]);
    }
}

/* Compute the attention of new token n to itself and to the earlier tokens of its sequence, and store
   the output in `attended`. The outer loops are over blocks and the inner ones over heads, which is the
   order in memory. The products with keys and with values each have one row. */
INLINE void attend(enum kind kind, const model *m, const batch *b, heads h, size_t offset, int n) {
    int d = m->d_model, hs = d / m->n_heads, length = b->positions[n] + 1;
    int width = (hs + PANEL - 1) / PANEL * PANEL; /* width of a row of `outputs` */
    size_t size = kind == FLOAT32 ? 4 : 2;
    vec sums[SUMS];
    for (int t = 0; t < length; t += PANEL) {
        const char *keys = (const char *)b->blocks[t / PANEL] + offset * size;
        for (int head = h.first; head < h.end; head++) {
            multiply(1, PANEL / LANES, kind, hs, b->qkv + (size_t)n * 3 * d + head * hs, 0,
                     keys + (size_t)head * hs * PANEL * size, PANEL, sums);
            UNROLL for (int c = 0; c < PANEL / LANES; c += 2)
                store(kind, h.scores + (size_t)head * b->capacity + t + c * LANES, sums[c],
                      sums[c + 1]);
        }
    }
    for (int head = h.first; head < h.end; head++) {
        float *p = h.scores + (size_t)head * b->capacity;
        float factor = 1.0f / exponentials(p, length, 1.0f / sqrtf(hs));
        for (int t = 0; t < length; t++) p[t] *= factor;
    }
    memset(h.outputs + h.first * width, 0, (h.end - h.first) * width * sizeof(float));
    for (int t = 0; t < length; t += PANEL) {
        const char *values = (const char *)b->blocks[t / PANEL] + (offset + (size_t)d * PANEL) * size;
        int tokens = length - t < PANEL ? length - t : PANEL;
        for (int head = h.first; head < h.end; head++)
            for (int j = 0; j < hs; j += PANEL) {
                multiply(1, PANEL / LANES, kind, tokens, h.scores + (size_t)head * b->capacity + t, 0,
                         values + ((size_t)head * hs * PANEL + j) * size, hs, sums);
                UNROLL for (int c = 0; c < PANEL / LANES; c++)
                    *(vec *)(h.outputs + head * width + j + c * LANES) += sums[c];
            }
    }
    for (int head = h.first; head < h.end; head++) {
        float *from = h.outputs + head * width, in_order[PANEL];
        for (int j = 0; j < hs; j += PANEL) {
            UNROLL for (int c = 0; c < PANEL; c += 2 * LANES)
                store(kind, in_order + c, *(vec *)(from + j + c), *(vec *)(from + j + c + LANES));
            int n_columns = hs - j < PANEL ? hs - j : PANEL;
            memcpy(b->attended + (size_t)n * d + head * hs + j, in_order, n_columns * sizeof(float));
        }
    }
}

/* Append keys and values of the new tokens of sequence r. With `need_output`, also compute the
   attention of these tokens. */
INLINE void attend_sequence_of(enum kind kind, const model *m, const batch *b, int l, int r, heads h,
                               int need_output) {
    int first = b->starts[r], end = b->starts[r + 1];
    size_t offset = ((size_t)l * b->n_sequences + r) * 2 * m->d_model * PANEL;
    for (int n = first; n < end; n++) append_kv(kind, m, b, h, offset, n);
    if (!need_output) return;
    /* Several tokens are computed head by head: keys and values of a head stay in the L1 cache. */
    int step = end - first == 1 ? h.end - h.first : 1;
    for (int head = h.first; head < h.end; head += step)
        for (int n = first; n < end; n++)
            attend(kind, m, b, (heads){head, head + step, h.scores, h.outputs}, offset, n);
}

NOINLINE void attend_sequence(const model *m, const batch *b, int l, int r, heads h, int need_output) {
    if (m->kind == FLOAT32)
        attend_sequence_of(FLOAT32, m, b, l, r, h, need_output);
    else
        attend_sequence_of(BFLOAT16, m, b, l, r, h, need_output);
}

/* ---------------------------------------------------------------------------------- layers */

typedef struct {
    _Alignas(64) atomic_int arrived; /* the numbers have cache lines of their own: threads poll `round` */
    _Alignas(64) atomic_int round;
    _Alignas(64) atomic_int sleeping; /* number of threads that sleep or are about to */
    pthread_mutex_t lock;
    pthread_cond_t next;
} barrier;

/* Wait until all n threads have arrived: spin for about 100 μs, then sleep. In a virtual machine it takes
   about as long to wake up a thread, so a shorter spin costs more than it saves. In a process with more
   threads than cores, such as a server, OpenMP's own barrier would sleep at once, without spinning. */
static void wait_for_all(barrier *b, int n) {
    if (n == 1) return;
    int round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add(&b->arrived, 1) == n - 1) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        atomic_store(&b->round, round + 1);
        if (atomic_load(&b->sleeping)) {
            pthread_mutex_lock(&b->lock);
            pthread_cond_broadcast(&b->next);
            pthread_mutex_unlock(&b->lock);
        }
        return;
    }
    for (int spins = 0; spins < 100000; spins++)
        if (atomic_load_explicit(&b->round, memory_order_acquire) != round) return;
    pthread_mutex_lock(&b->lock);
    atomic_fetch_add(&b->sleeping, 1);
    while (atomic_load(&b->round) == round) pthread_cond_wait(&b->next, &b->lock);
    atomic_fetch_sub(&b->sleeping, 1);
    pthread_mutex_unlock(&b->lock);
}

/* Run this thread's part of a forward pass: its own sequences or, if there are few sequences, its own
   columns and heads of all sequences. */
static void run(const model *m, const batch *b, barrier *all) {
    int thread = omp_get_thread_num(), n_threads = omp_get_num_threads(), d = m->d_model;
    int separate = b->n_sequences >= MIN_SEQUENCES * n_threads; /* each thread has its own sequences */
    int part = separate ? 0 : thread, parts = separate ? 1 : n_threads;
    int begin = separate ? b->n_sequences * thread / n_threads : 0; /* the first of its sequences */
    int end = separate ? b->n_sequences * (thread + 1) / n_threads : b->n_sequences;
    int first = b->starts[begin], n = b->starts[end] - first; /* new tokens of these sequences */
    float *x = b->x + (size_t)first * d, *attended = b->attended + (size_t)first * d;
    /* If threads share sequences, each computes its own copy of `normed`, which saves a barrier. */
    float *normed = b->normed + (size_t)(separate ? first : thread * n) * d;
    float *qkv = b->qkv + (size_t)first * 3 * d, *up = b->up + (size_t)first * m->d_ff;
    float *scores = b->scores + (size_t)thread * m->n_heads * b->capacity;
    int width = (d / m->n_heads + PANEL - 1) / PANEL * PANEL;
    float *outputs = b->outputs + (size_t)thread * m->n_heads * width;
    enum kind kind = m->kind;
    for (int i = n * part / parts; i < n * (part + 1) / parts; i++)
        for (int j = 0; j < d; j++)
            x[(size_t)i * d + j] = m->embedding[b->ids[first + i] * d + j]
                                 + m->positions[b->positions[first + i] * d + j];
    wait_for_all(all, parts);
    for (int l = 0; l < m->n_layers; l++) {
        const layer *w = &m->layers[l];
        int need_output = b->logits || l + 1 < m->n_layers; /* if not, only keys and values */
        layer_norm(w->norm1, m->eps, d, n, x, normed);
        product(kind, &w->qkv, n, normed, qkv, SET, part, parts);
        wait_for_all(all, parts);
        int nh = m->n_heads, n_pairs = (end - begin) * nh; /* pairs of a sequence and a head */
        int from = n_pairs * part / parts, to = n_pairs * (part + 1) / parts;
        for (int r = from / nh; r * nh < to; r++) {
            heads h = {from > r * nh ? from - r * nh : 0, to - r * nh < nh ? to - r * nh : nh, scores,
                       outputs};
            attend_sequence(m, b, l, begin + r, h, need_output);
        }
        if (!need_output) return;
        wait_for_all(all, parts);
        product(kind, &w->out, n, attended, x, ADD, part, parts);
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

/* ------------------------------------------------------------------------------- sampling */

/* Return the number (with `as_number`) or the sum of those elements of p that are above `floor`. */
INLINE float mass_above(float floor, int as_number, const float *p, int n) {
    vec sums[PANEL / LANES] = {{0}}, one = (vec){0} + 1.0f, total = {0};
    for (int i = 0; i < n; i += PANEL)
        UNROLL for (int c = 0; c < PANEL / LANES; c++) {
            vec x = *(const vec *)(p + i + c * LANES);
            sums[c] += (vec)((ivec)(as_number ? one : x) & (x > floor));
        }
    float sum = 0;
    UNROLL for (int c = 0; c < PANEL / LANES; c++) total += sums[c];
    for (int l = 0; l < LANES; l++) sum += total[l];
    return sum;
}

/* Set p to 0 for all but the most likely tokens. With `as_number`, a token stays if the number of more
   likely tokens is below `limit`; without it, if the sum of their p is below `limit`. Among equally
   likely tokens, those with smaller ids count as more likely. The largest p must be 1. */
INLINE void keep_top(float *p, int n, int as_number, float limit) {
    /* Positive floats have the same order as their bits, read as integers. So bisect over the bits to
       find the smallest p that stays. */
    int32_t low = -1, high = 0x3f800000; /* the bits of 1.0 */
    float floor;
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        memcpy(&floor, &middle, 4);
        if (mass_above(floor, as_number, p, n) < limit) high = middle; else low = middle;
    }
    memcpy(&floor, &high, 4);
    float above = mass_above(floor, as_number, p, n);
    for (int i = 0; i < n; i++)
        if (p[i] <= floor) {
            if (p[i] == floor && above < limit) above += as_number ? 1.0f : p[i]; else p[i] = 0;
        }
}

/* Return the first token at which the cumulative sum of p exceeds `point` times the sum of p. `point` is
   in [0, 1). */
static int64_t inverse_transform(const float *p, int n, float point) {
    float target = point * mass_above(0, 0, p, n), sum = 0, before = 0;
    int block = 0;
    for (int i = 0; i < n && sum <= target; i += PANEL) {
        vec sums = {0};
        float more = 0;
        for (int j = 0; j < PANEL; j += LANES) sums += *(vec *)(p + i + j);
        for (int l = 0; l < LANES; l++) more += sums[l];
        if (more > 0) { block = i; before = sum; sum += more; }
    }
    int64_t token = block; /* rounding must not select a token of probability 0 */
    for (int i = block; i < block + PANEL && before <= target; i++)
        if (p[i] > 0) { token = i; before += p[i]; }
    return token;
}

/* Choose a token from logits, with the same operations in the same order as sampling.py. p is scratch
   memory for n_tokens + PANEL elements. */
static int64_t choose(const sampler *s, const float *logits, const uint8_t *seen, float point, float *p) {
    int n = s->n_tokens;
    memcpy(p, logits, n * sizeof(float));
    if (seen)
        for (int i = 0; i < n; i++)
            if (seen[i]) p[i] = p[i] > 0 ? p[i] / s->penalty : p[i] * s->penalty;
    if (s->temperature == 0) {
        int64_t best = 0;
        for (int i = 1; i < n; i++) best = p[i] > p[best] ? i : best;
        return best;
    }
    exponentials(p, n, 1.0f / s->temperature); /* probabilities, relative to the largest */
    memset(p + n, 0, PANEL * sizeof(float));
    if (s->top_k) keep_top(p, n, 1, s->top_k);
    if (s->top_p) keep_top(p, n, 0, s->top_p * mass_above(0, 0, p, n));
    if (s->min_p)
        for (int i = 0; i < n; i++) p[i] = p[i] < s->min_p ? 0 : p[i];
    return inverse_transform(p, n, point);
}

/* Choose the next tokens of the sequences from `begin` to `end` - 1, and store them in `ids` (B,). */
void sample(const sampler *s, int begin, int end, const float *logits, const float *points,
            int64_t *ids) {
    float *scratch = s->scratch + (size_t)omp_get_thread_num() * (s->n_tokens + PANEL);
    for (int r = begin; r < end; r++) {
        uint8_t *seen = s->seen ? s->seen + (size_t)r * s->n_tokens : 0;
        ids[r] = choose(s, logits + (size_t)r * s->vocab_size, seen, points[r], scratch);
        if (s->ended[r]) ids[r] = s->end_of_text;
        if (ids[r] == s->end_of_text) s->ended[r] = 1;
        else if (seen) seen[ids[r]] = 1;
    }
}

/* ------------------------------------------------------------------------------------ calls */

/* Run this thread's part of all steps. Each chosen token is the new token of the next step. */
static void run_steps(const model *m, batch b, const sampler *s, barrier *all, int *n_steps) {
    int thread = omp_get_thread_num(), n_threads = omp_get_num_threads(), n = b.n_sequences;
    for (int step = 0; step < s->steps; step++) {
        size_t row = (size_t)step * n;
        run(m, &b, all);
        wait_for_all(all, n_threads); /* for the logits */
        sample(s, n * thread / n_threads, n * (thread + 1) / n_threads, b.logits, s->points + row,
               s->ids + row);
        wait_for_all(all, n_threads); /* for the tokens */
        if (thread == 0) *n_steps = step + 1;
        if (!memchr(s->ended, 0, n)) return;
        b.ids = s->ids + row;
        b.positions += n;
        b.logits += (size_t)n * m->vocab_size;
    }
}

/* Without a sampler, run one forward pass over the new tokens. With a sampler, there must be one new
   token per sequence: run `steps` steps, or fewer if all sequences have ended earlier. Return the number
   of steps. If an id is not in the vocabulary, compute nothing and return -1. */
int read_tokens(const model *m, const batch *b, const sampler *s) {
    for (int i = 0; i < b->starts[b->n_sequences]; i++)
        if (b->ids[i] < 0 || b->ids[i] >= m->vocab_size) return -1;
    barrier all = {0, 0, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};
    int n_steps = 1;
#pragma omp parallel num_threads(b->threads)
    if (s) run_steps(m, *b, s, &all, &n_steps); else run(m, b, &all);
    return n_steps;
}
