/* The decode step's inner loops in float32: attention over cached keys and values, norm, gate, sampling.

   Plain C with GCC's vector extensions (GCC and Clang, any processor); compiled and loaded by native.py, whose
   docstrings give shapes and meanings. Every function here has a twin in torch that the tests hold it to. Nothing
   allocates, nothing is kept between calls, one thread runs each call.

   A page holds PAGE tokens of one layer: keys as [kv head][dim][token], so that one vector holds one number of
   several tokens, and values as [kv head][token][dim], dim padded to whole vectors (cache.py). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PAGE 16
#if defined(__AVX512F__)
#define LANES 16
#define TILE 8 /* queries whose sums are kept in registers at once */
#elif defined(__AVX__)
#define LANES 8
#define TILE 4
#else
#define LANES 4
#define TILE 4
#endif
#define PER_PAGE (PAGE / LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vf load(const float *from) { return *(const vf *)from; }
INLINE void store(float *to, vf x) { *(vf *)to = x; }
INLINE vf all(float x) { return x - (vf){}; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE float sum(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE float largest(vf x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* e^x to about one unit in the last place; 0 below -87, NaN stays NaN. Halves x into n ln 2 + r, |r| <= ln 2 / 2, and
   takes the Taylor series of e^r to degree 7. */
INLINE vf exponential(vf x) {
    vi too_small = x < -87.0f;
    x = choose(x > 88.0f, all(88.0f), x);
    vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    n = choose(too_small, all(0), n);
    vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = 1.98412698e-4f * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    vf whole = (vf)((__builtin_convertvector(choose(n == n, n, all(0)), vi) + 127) << 23);
    return choose(too_small, all(0), p * whole);
}

INLINE vf hyperbolic_tangent(vf x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

/* ---- attention ---- */

typedef struct {
    const float *q, *k, *v; /* of the new tokens, one row each */
    float *out;             /* rows x heads x dim */
    int64_t q_stride, k_stride, v_stride;
    const float *cos, *sin; /* positions x rotary */
    float *k_pages, *v_pages; /* this layer's */
    const int64_t *slot, *group, *length; /* of each row; rows of one group stand together */
    const int64_t *own_pages, *prompt_pages, *prompt_length;
    int64_t own_columns, prompt_columns; /* of the two tables: slots x columns, groups x columns */
    int64_t rows, heads, kv_heads, dim, padded_dim, rotary, window;
    float scale, softcap;
    float *scratch;
    int64_t scratch_size;
} Attention;

INLINE void rotate(float *to, const float *from, const float *cos, const float *sin, int64_t rotary, int64_t dim,
                   float scale) {
    for (int64_t i = 0; i < rotary; i++) {
        float first = from[i], second = from[i + rotary];
        to[i] = (first * cos[i] - second * sin[i]) * scale;
        to[i + rotary] = (second * cos[i] + first * sin[i]) * scale;
    }
    for (int64_t i = 2 * rotary; i < dim; i++) to[i] = from[i] * scale;
}

/* scores[r][token] = q[r] . k[token] for `count` queries and one page of keys. Fetches the `next` page meanwhile:
   pages lie anywhere, so the processor cannot guess it. */
INLINE void page_scores_of(const int count, const float *q, const float *k, const float *next, int64_t dim,
                           float *scores, int64_t stride) {
    vf sums[TILE][PER_PAGE];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < PER_PAGE; c++) sums[r][c] = all(0);
    for (int64_t d = 0; d < dim; d++) {
        __builtin_prefetch(next + d * PAGE);
        for (int c = 0; c < PER_PAGE; c++) {
            vf keys = load(k + d * PAGE + c * LANES);
            for (int r = 0; r < count; r++) sums[r][c] += keys * q[r * dim + d];
        }
    }
    for (int r = 0; r < count; r++)
        for (int c = 0; c < PER_PAGE; c++) store(scores + r * stride + c * LANES, sums[r][c]);
}

/* out[r] += weights[r][token] * v[token] over tokens `from` to `to` of one page */
INLINE void page_values_of(const int count, const float *weights, int64_t stride, const float *v, const float *next,
                           int64_t from, int64_t to, int64_t padded_dim, float *out) {
    for (int64_t d = 0; d < padded_dim; d += LANES) {
        vf sums[TILE];
        for (int r = 0; r < count; r++) sums[r] = load(out + r * padded_dim + d);
        for (int64_t t = from; t < to; t++) {
            vf values = load(v + t * padded_dim + d);
            __builtin_prefetch(next + t * padded_dim + d);
            for (int r = 0; r < count; r++) sums[r] += values * weights[r * stride + t];
        }
        for (int r = 0; r < count; r++) store(out + r * padded_dim + d, sums[r]);
    }
}

#define FOR_COUNT(count, CALL)                                                                                         \
    switch (count) {                                                                                                   \
    case 1: CALL(1); break;                                                                                            \
    case 2: CALL(2); break;                                                                                            \
    case 3: CALL(3); break;                                                                                            \
    case 4: CALL(4); break;                                                                                            \
    case 5: CALL(5 <= TILE ? 5 : 1); break;                                                                            \
    case 6: CALL(6 <= TILE ? 6 : 1); break;                                                                            \
    case 7: CALL(7 <= TILE ? 7 : 1); break;                                                                            \
    case 8: CALL(8 <= TILE ? 8 : 1); break;                                                                            \
    }

/* Keys and values of one sequence of pages, under one kv head. `first` is the first token seen, `end` one past the
   last. scores[r] begins at the sequence's token 0. `after` is the page that will be read when these are done. */
static void scores_over(const float *q, int64_t queries, const float *k_pages, const int64_t *pages, int64_t page_size,
                        int64_t after, int64_t first, int64_t end, int64_t dim, float *scores, int64_t stride) {
    for (int64_t r = 0; r < queries; r += TILE) {
        int count = queries - r < TILE ? (int)(queries - r) : TILE;
        for (int64_t page = first / PAGE; page * PAGE < end; page++) {
            const float *k = k_pages + pages[page] * page_size;
            const float *next = k_pages + ((page + 1) * PAGE < end ? pages[page + 1] : after) * page_size;
            float *to = scores + r * stride + page * PAGE;
#define CALL(n) page_scores_of(n, q + r * dim, k, next, dim, to, stride)
            FOR_COUNT(count, CALL)
#undef CALL
        }
    }
}

static void values_over(const float *weights, int64_t stride, int64_t queries, const float *v_pages,
                        const int64_t *pages, int64_t page_size, int64_t after, int64_t first, int64_t end,
                        int64_t padded_dim, float *out) {
    for (int64_t r = 0; r < queries; r += TILE) {
        int count = queries - r < TILE ? (int)(queries - r) : TILE;
        for (int64_t page = first / PAGE; page * PAGE < end; page++) {
            const float *v = v_pages + pages[page] * page_size;
            const float *next = v_pages + ((page + 1) * PAGE < end ? pages[page + 1] : after) * page_size;
            int64_t from = first > page * PAGE ? first - page * PAGE : 0;
            int64_t to = end - page * PAGE < PAGE ? end - page * PAGE : PAGE;
            const float *w = weights + r * stride + page * PAGE;
#define CALL(n) page_values_of(n, w, stride, v, next, from, to, padded_dim, out + r * padded_dim)
            FOR_COUNT(count, CALL)
#undef CALL
        }
    }
}

/* In place: scores to unnormalised weights, of which the sum is returned. Tokens outside first..end weigh 0. */
static float soften(float *scores, const int64_t *first, const int64_t *end, const int64_t *offset, float softcap) {
    vf most = all(-1e30f);
    for (int part = 0; part < 2; part++) {
        if (end[part] <= first[part]) continue;
        float *s = scores + offset[part];
        int64_t from = first[part] / PAGE * PAGE, to = (end[part] + PAGE - 1) / PAGE * PAGE;
        if (softcap > 0)
            for (int64_t t = from; t < to; t += LANES)
                store(s + t, softcap * hyperbolic_tangent(load(s + t) / softcap));
        for (int64_t t = from; t < first[part]; t++) s[t] = -1e30f;
        for (int64_t t = end[part]; t < to; t++) s[t] = -1e30f;
        for (int64_t t = from; t < to; t += LANES) {
            vf x = load(s + t);
            most = choose(x > most, x, most);
        }
    }
    vf peak = all(largest(most)), total = all(0);
    for (int part = 0; part < 2; part++) {
        if (end[part] <= first[part]) continue;
        float *s = scores + offset[part];
        for (int64_t t = first[part] / PAGE * PAGE; t < end[part]; t += LANES) {
            vf w = exponential(load(s + t) - peak);
            store(s + t, w);
            total += w;
        }
    }
    return sum(total);
}

static void write_to_cache(const Attention *a) {
    int64_t k_page = a->kv_heads * a->dim * PAGE, v_page = a->kv_heads * PAGE * a->padded_dim;
    for (int64_t n = 0; n < a->rows; n++) {
        int64_t own = a->length[n] - 1, at = own % PAGE, position = a->prompt_length[a->group[n]] + own;
        int64_t page = a->own_pages[a->slot[n] * a->own_columns + own / PAGE];
        float *turned = a->scratch;
        for (int64_t h = 0; h < a->kv_heads; h++) {
            rotate(turned, a->k + n * a->k_stride + h * a->dim, a->cos + position * a->rotary,
                   a->sin + position * a->rotary, a->rotary, a->dim, 1.0f);
            float *k = a->k_pages + page * k_page + h * a->dim * PAGE + at;
            for (int64_t d = 0; d < a->dim; d++) k[d * PAGE] = turned[d];
            memcpy(a->v_pages + page * v_page + (h * PAGE + at) * a->padded_dim, a->v + n * a->v_stride + h * a->dim,
                   a->dim * sizeof(float));
        }
    }
}

INLINE int64_t own_page(const Attention *a, int64_t n) { return a->own_pages[a->slot[n] * a->own_columns]; }

/* Rows `begin` to `end`, all of one group, under one kv head: the prompt's keys are read once for all of them. */
static void attend_rows(const Attention *a, int64_t head, int64_t begin, int64_t end) {
    int64_t k_page = a->kv_heads * a->dim * PAGE, v_page = a->kv_heads * PAGE * a->padded_dim;
    int64_t per_kv = a->heads / a->kv_heads, queries = (end - begin) * per_kv;
    int64_t group = a->group[begin], prompt = a->prompt_length[group];
    int64_t prompt_width = (prompt + PAGE - 1) / PAGE * PAGE, longest = 0, prompt_first = prompt;
    for (int64_t n = begin; n < end; n++) {
        int64_t first = a->window && prompt + a->length[n] > a->window ? prompt + a->length[n] - a->window : 0;
        if (a->length[n] > longest) longest = a->length[n];
        if (first < prompt_first) prompt_first = first;
    }
    int64_t stride = prompt_width + (longest + PAGE - 1) / PAGE * PAGE;
    float *q = a->scratch, *mixed = q + queries * a->dim, *totals = mixed + queries * a->padded_dim;
    float *scores = totals + queries;
    const float *k_pages = a->k_pages + head * a->dim * PAGE, *v_pages = a->v_pages + head * PAGE * a->padded_dim;
    const int64_t *prompt_pages = a->prompt_pages + group * a->prompt_columns;

    for (int64_t n = begin; n < end; n++) {
        int64_t position = prompt + a->length[n] - 1;
        for (int64_t g = 0; g < per_kv; g++)
            rotate(q + ((n - begin) * per_kv + g) * a->dim, a->q + n * a->q_stride + (head * per_kv + g) * a->dim,
                   a->cos + position * a->rotary, a->sin + position * a->rotary, a->rotary, a->dim, a->scale);
    }
    memset(mixed, 0, queries * a->padded_dim * sizeof(float));
    scores_over(q, queries, k_pages, prompt_pages, k_page, own_page(a, begin), prompt_first, prompt, a->dim, scores,
                stride);
    for (int64_t n = begin; n < end; n++) {
        int64_t r = (n - begin) * per_kv, length = a->length[n];
        int64_t first = a->window && prompt + length > a->window ? prompt + length - a->window : 0;
        int64_t firsts[2] = {first < prompt ? first : prompt, first > prompt ? first - prompt : 0};
        int64_t ends[2] = {prompt, length}, offsets[2] = {0, prompt_width};
        scores_over(q + r * a->dim, per_kv, k_pages, a->own_pages + a->slot[n] * a->own_columns, k_page,
                    own_page(a, n + 1 < end ? n + 1 : begin), firsts[1], length, a->dim, scores + r * stride + prompt_width, stride);
        for (int64_t g = 0; g < per_kv; g++) {
            float *row = scores + (r + g) * stride;
            totals[r + g] = soften(row, firsts, ends, offsets, a->softcap);
            /* what other rows of the group see and this one does not */
            int64_t unseen = firsts[0] < prompt ? firsts[0] / PAGE * PAGE : prompt;
            for (int64_t t = prompt_first; t < unseen; t++) row[t] = 0;
        }
    }
    values_over(scores, stride, queries, v_pages, prompt_pages, v_page, own_page(a, begin), prompt_first, prompt,
                a->padded_dim, mixed);
    for (int64_t n = begin; n < end; n++) {
        int64_t r = (n - begin) * per_kv, length = a->length[n];
        int64_t first = a->window && prompt + length > a->window ? prompt + length - a->window : 0;
        values_over(scores + r * stride + prompt_width, stride, per_kv, v_pages,
                    a->own_pages + a->slot[n] * a->own_columns, v_page,
                    own_page(a, n + 1 < end ? n + 1 : begin), first > prompt ? first - prompt : 0, length,
                    a->padded_dim, mixed + r * a->padded_dim);
        for (int64_t g = 0; g < per_kv; g++) {
            float *to = a->out + (n * a->heads + head * per_kv + g) * a->dim;
            float share = 1.0f / totals[r + g];
            for (int64_t d = 0; d < a->dim; d++) to[d] = mixed[(r + g) * a->padded_dim + d] * share;
        }
    }
}

void attend(const Attention *a) {
    write_to_cache(a);
    int64_t per_kv = a->heads / a->kv_heads;
    for (int64_t begin = 0; begin < a->rows;) {
        int64_t end = begin, longest = 0;
        /* As many rows of the group as the scratch has room for; native.py sees that one always fits. */
        while (end < a->rows && a->group[end] == a->group[begin]) {
            int64_t length = a->length[end] > longest ? a->length[end] : longest;
            int64_t width = a->prompt_length[a->group[begin]] + length + 2 * PAGE;
            if (end > begin && (end + 1 - begin) * per_kv * (width + a->dim + a->padded_dim + 1) > a->scratch_size)
                break;
            longest = length;
            end++;
        }
        for (int64_t head = 0; head < a->kv_heads; head++) attend_rows(a, head, begin, end);
        begin = end;
    }
}

/* ---- token-wise operations ---- */

INLINE void norm_row(const float *x, const float *weight, float epsilon, float *to, int64_t width) {
    vf squares = all(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < width; i++) total += x[i] * x[i];
    float share = 1.0f / sqrtf(total / (float)width + epsilon);
    for (i = 0; i + LANES <= width; i += LANES) store(to + i, load(x + i) * share * load(weight + i));
    for (; i < width; i++) to[i] = x[i] * share * weight[i];
}

void norm(const float *x, int64_t x_stride, const float *weight, float epsilon, float *to, int64_t rows, int64_t inner,
          int64_t width) {
    for (int64_t n = 0; n < rows; n++)
        for (int64_t j = 0; j < inner; j++)
            norm_row(x + n * x_stride + j * width, weight, epsilon, to + (n * inner + j) * width, width);
}

/* x += more; to = norm(x) */
void add_norm(float *x, const float *more, const float *weight, float epsilon, float *to, int64_t rows, int64_t width) {
    for (int64_t n = 0; n < rows; n++) {
        float *row = x + n * width;
        const float *other = more + n * width;
        for (int64_t i = 0; i < width; i++) row[i] += other[i];
        norm_row(row, weight, epsilon, to + n * width, width);
    }
}

/* to = activation(first half) * second half; activation 0: silu, 1: gelu, tanh form. Both are x * sigmoid(y). */
INLINE vf gated(vf gate, vf up, const int activation) {
    vf y = activation == 0 ? gate : 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + exponential(-y)) * up;
}

INLINE void gate_rows(const float *gate_up, float *to, int64_t rows, int64_t width, const int activation) {
    for (int64_t n = 0; n < rows; n++) {
        const float *gate = gate_up + 2 * n * width, *up = gate + width;
        float *out = to + n * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(out + i, gated(load(gate + i), load(up + i), activation));
        if (i < width) {
            float g[LANES] = {0}, u[LANES] = {0}, o[LANES];
            memcpy(g, gate + i, (width - i) * sizeof(float));
            memcpy(u, up + i, (width - i) * sizeof(float));
            store(o, gated(load(g), load(u), activation));
            memcpy(out + i, o, (width - i) * sizeof(float));
        }
    }
}

void gate(const float *gate_up, float *to, int64_t rows, int64_t width, int64_t activation) {
    if (activation == 0)
        gate_rows(gate_up, to, rows, width, 0);
    else
        gate_rows(gate_up, to, rows, width, 1);
}

/* ---- sampling ---- */

#define STRETCH 64

/* One number in [0, 1) per seed and position: SplitMix64, as sampling.uniforms. */
static double uniform(int64_t seed, int64_t position) {
    uint64_t z = (uint64_t)seed + ((uint64_t)position + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

/* The weights e^((logit - peak) / temperature) of up to STRETCH ids, zeros behind them; returns their sum. */
INLINE float stretch_weights(const float *logits, int64_t count, float peak, float inverse, float *weights) {
    float padded[STRETCH];
    const float *from = logits;
    if (count < STRETCH) {
        for (int i = 0; i < STRETCH; i++) padded[i] = i < count ? logits[i] : -INFINITY;
        from = padded;
    }
    vf total = all(0);
    for (int i = 0; i < STRETCH; i += LANES) {
        vf w = exponential((load(from + i) - peak) * inverse);
        store(weights + i, w);
        total += w;
    }
    return sum(total);
}

/* One id per row by inverse CDF and its log-prob. `sums` is scratch of (vocab + 63) / 64 doubles. */
void sample(const float *logits, int64_t stride, int64_t rows, int64_t vocab, const float *temperature,
            const int64_t *seed, const int64_t *position, double *sums, int64_t *ids, float *logps) {
    float weights[STRETCH];
    for (int64_t n = 0; n < rows; n++) {
        const float *row = logits + n * stride;
        float inverse = 1.0f / temperature[n];
        vf most = all(-INFINITY);
        int64_t i = 0;
        for (; i + LANES <= vocab; i += LANES) most = choose(load(row + i) > most, load(row + i), most);
        float peak = largest(most);
        for (; i < vocab; i++) peak = row[i] > peak ? row[i] : peak;

        double total = 0;
        int64_t stretches = (vocab + STRETCH - 1) / STRETCH;
        for (int64_t s = 0; s < stretches; s++) {
            int64_t count = vocab - s * STRETCH < STRETCH ? vocab - s * STRETCH : STRETCH;
            sums[s] = stretch_weights(row + s * STRETCH, count, peak, inverse, weights);
            total += sums[s];
        }
        double target = uniform(seed[n], position[n]) * total;
        int64_t chosen = 0;
        /* Rounding can leave the target past the last stretch with weight; then that one is taken. */
        int64_t last = 0;
        for (int64_t s = 0; s < stretches; s++)
            if (sums[s] > 0) last = s;
        while (chosen < last && target >= sums[chosen]) target -= sums[chosen++];
        int64_t count = vocab - chosen * STRETCH < STRETCH ? vocab - chosen * STRETCH : STRETCH;
        stretch_weights(row + chosen * STRETCH, count, peak, inverse, weights);
        int64_t id = 0;
        for (int64_t j = 0; j < count; j++) {
            if (weights[j] > 0) id = j;
            if (target < weights[j]) break;
            target -= weights[j];
        }
        id += chosen * STRETCH;
        ids[n] = id;
        logps[n] = (row[id] - peak) * inverse - (float)log(total);
    }
}
