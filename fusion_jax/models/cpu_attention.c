/* Attention on CPU, forward and backward, for XLA; see cpu_attention.py for the contract.

Every array is read and written as the model has it: q, out and their gradients (B, Q, H, d), k and v (B, S, K, d), all
float32 and contiguous; segments int32 (B, Q) and (B, S).

A task is one head (forward) or the heads that share one key/value head (backward). It takes LANES * COLUMNS queries at
a time, one in each lane of the vectors, and walks over blocks of keys:

    scores (keys x queries) = K Q^T       maxima and sums run down the rows, never across the lanes
    weights = 2^(scores - peak)           with the scale d^-0.5 and log2(e) already in Q
    O^T (d x queries) += V^T weights

so scores live in the first cache and are never written to memory. All products are `product`: broadcast one value of
the left matrix, multiply it by a row of the right one. What a task computes does not depend on the threads, so that
results are the same bit for bit however many there are. */

#include "cpu_kernels.h"

#define KEYS 96 /* keys of a block: its scores and its part of K and V fit into the first cache */
#define CAUSAL_KEYS 32 /* smaller ones, so that more of them lie beyond the diagonal and are skipped */

typedef struct {
    int64_t batch, queries, keys, heads, kv_heads, size, causal, window;
    const float *q, *k, *v, *lse, *out, *d_out;
    const int32_t *q_segments, *k_segments;
    float *result, *d_q, *d_k, *d_v;
} Call;

/* Copies one head's (length, size) out of (length, heads, size) into rows of `width` >= size, padded with zeros. */
static void gather(const float *from, int64_t length, int64_t stride, int64_t size, int64_t width, float scale,
                   float *to) {
    for (int64_t i = 0; i < length; i++, from += stride, to += width) {
        for (int64_t j = 0; j < size; j++) to[j] = from[j] * scale;
        for (int64_t j = size; j < width; j++) to[j] = 0.0f;
    }
}

/* Copies up to QUERIES rows of one head as columns: (size, QUERIES), zeros beyond `count`. */
static void gather_columns(const float *from, int count, int64_t stride, int64_t size, float scale, float *to) {
    for (int64_t j = 0; j < size; j++)
        for (int i = 0; i < QUERIES; i++) to[j * QUERIES + i] = i < count ? from[i * stride + j] * scale : 0.0f;
}

/* Which of a block's keys a block's queries see. */
enum { NONE, SOME, ALL };

typedef struct {
    int32_t segment[QUERIES], place[QUERIES], lowest, highest, first, last;
} QueryBlock;

static QueryBlock query_block(const Call *c, int64_t b, int64_t first) {
    QueryBlock block = {.first = (int32_t)first, .lowest = INT32_MAX, .highest = INT32_MIN};
    const int32_t *segments = c->q_segments + b * c->queries;
    block.last = (int32_t)(first + QUERIES < c->queries ? first + QUERIES : c->queries) - 1;
    for (int i = 0; i < QUERIES; i++) {
        block.place[i] = first + i < block.last ? (int32_t)first + i : block.last;
        const int32_t s = block.segment[i] = segments[block.place[i]];
        if (s < block.lowest) block.lowest = s;
        if (s > block.highest) block.highest = s;
    }
    return block;
}

static int visible(const Call *c, const QueryBlock *q, const int32_t *segments, int64_t first, int64_t last) {
    int32_t lowest = segments[first], highest = lowest;
    for (int64_t j = first + 1; j <= last; j++) {
        if (segments[j] < lowest) lowest = segments[j];
        if (segments[j] > highest) highest = segments[j];
    }
    if (highest <= 0 || highest < q->lowest || lowest > q->highest) return NONE;
    if (c->causal && first > q->last) return NONE;
    if (c->causal && c->window && q->first - last >= c->window) return NONE;
    if (lowest != highest || q->lowest != q->highest) return SOME;
    if (c->causal && (last > q->first || (c->window && q->last - first >= c->window))) return SOME;
    return ALL;
}

/* -1 in the lanes whose query sees key j, else 0. */
INLINE Integers sees(const Call *c, const QueryBlock *q, int32_t segment, int32_t j, int column) {
    const Integers zero = {0};
    Integers mask = (*(const Integers *)(q->segment + column * LANES) == segment + zero) & ((segment > 0 ? -1 : 0) + zero);
    if (c->causal) {
        const Integers distance = *(const Integers *)(q->place + column * LANES) - j;
        mask &= distance >= zero;
        if (c->window) mask &= distance < (int32_t)c->window + zero;
    }
    return mask;
}

static int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

static int64_t forward_scratch(const Call *c) { return 2 * (c->keys * c->size + 16) + 2 * c->size * QUERIES + KEYS * QUERIES; }

static void forward_task(const void *call, int64_t task, float *memory) {
    const Call *c = call;
    const int64_t b = task / c->heads, h = task % c->heads, size = c->size, kv = h / (c->heads / c->kv_heads);
    const int64_t q_stride = c->heads * size, k_stride = c->kv_heads * size;
    float *k = take(&memory, c->keys * size), *v = take(&memory, c->keys * size);
    float *q = take(&memory, size * QUERIES), *sum = take(&memory, size * QUERIES), *s = take(&memory, KEYS * QUERIES);
    gather(c->k + b * c->keys * k_stride + kv * size, c->keys, k_stride, size, size, 1.0f, k);
    gather(c->v + b * c->keys * k_stride + kv * size, c->keys, k_stride, size, size, 1.0f, v);
    const int32_t *segments = c->k_segments + b * c->keys;
    const int64_t step = c->causal ? CAUSAL_KEYS : KEYS;
    for (int64_t first = 0; first < c->queries; first += QUERIES) {
        const QueryBlock block = query_block(c, b, first);
        const int count = block.last - block.first + 1;
        const int64_t at = (b * c->queries + first) * q_stride + h * size;
        gather_columns(c->q + at, count, q_stride, size, LOG2_E / sqrtf((float)size), q);
        memset(sum, 0, sizeof(float) * size * QUERIES);
        Vector peak[COLUMNS], total[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) peak[j] = all(MASKED), total[j] = all(0.0f);
        for (int64_t from = 0; from < c->keys; from += step) {
            const int keys = (int)(from + step < c->keys ? step : c->keys - from);
            const int see = visible(c, &block, segments, from, from + keys - 1);
            if (see == NONE) continue;
            product(keys, COLUMNS, (int)size, k + from * size, size, 1, q, QUERIES, s, QUERIES, 0);
            if (see == SOME)
                for (int i = 0; i < keys; i++)
                    for (int j = 0; j < COLUMNS; j++) {
                        float *p = s + i * QUERIES + j * LANES;
                        store(p, choose(sees(c, &block, segments[from + i], (int32_t)from + i, j), load(p), all(MASKED)));
                    }
            Vector highest[COLUMNS], part[COLUMNS];
            for (int j = 0; j < COLUMNS; j++) highest[j] = peak[j], part[j] = all(0.0f);
            for (int i = 0; i < keys; i++)
                for (int j = 0; j < COLUMNS; j++) highest[j] = LARGER(highest[j], load(s + i * QUERIES + j * LANES));
            for (int j = 0; j < COLUMNS; j++) {
                const Vector less = power_of_2(peak[j] - highest[j]);
                peak[j] = highest[j];
                total[j] *= less;
                for (int64_t i = 0; i < size; i++)
                    store(sum + i * QUERIES + j * LANES, load(sum + i * QUERIES + j * LANES) * less);
            }
            for (int i = 0; i < keys; i++)
                for (int j = 0; j < COLUMNS; j++) {
                    float *p = s + i * QUERIES + j * LANES;
                    Vector weight = power_of_2(load(p) - highest[j]);
                    if (see == SOME) weight = choose(~(load(p) <= all(0.5f * MASKED)), weight, all(0.0f));
                    part[j] += weight;
                    store(p, weight);
                }
            for (int j = 0; j < COLUMNS; j++) total[j] += part[j];
            product((int)size, COLUMNS, keys, v + from * size, 1, size, s, QUERIES, sum, QUERIES, 1);
        }
        float *lse = c->d_q + (b * c->heads + h) * c->queries + first; /* the second result of the forward call */
        for (int i = 0; i < count; i++) {
            const float sum_of = ((float *)total)[i]; /* 0: sees no key */
            const float inverse = sum_of != 0.0f ? 1.0f / sum_of : 0.0f;
            lse[i] = sum_of != 0.0f ? ((float *)peak)[i] + log2f(sum_of) : -MASKED;
            float *to = c->result + at + i * q_stride;
            for (int64_t j = 0; j < size; j++) to[j] = sum[j * QUERIES + i] * inverse;
        }
    }
}

static int64_t backward_scratch(const Call *c) {
    return 2 * c->keys * (c->size + padded(c->size)) + 64 + 3 * c->size * QUERIES + 2 * padded(c->size) * QUERIES +
           2 * KEYS * QUERIES;
}

static void backward_task(const void *call, int64_t task, float *memory) {
    const Call *c = call;
    const int64_t b = task / c->kv_heads, kv = task % c->kv_heads, size = c->size, width = padded(size);
    const int64_t q_stride = c->heads * size, k_stride = c->kv_heads * size, group = c->heads / c->kv_heads;
    const int vectors = (int)(width / LANES);
    const float scale = 1.0f / sqrtf((float)size);
    float *k = take(&memory, c->keys * size), *v = take(&memory, c->keys * size);
    float *d_k = take(&memory, c->keys * width), *d_v = take(&memory, c->keys * width);
    float *q = take(&memory, size * QUERIES), *d_out = take(&memory, size * QUERIES), *d_q = take(&memory, size * QUERIES);
    float *q_rows = take(&memory, width * QUERIES), *d_out_rows = take(&memory, width * QUERIES);
    float *s = take(&memory, KEYS * QUERIES), *d_s = take(&memory, KEYS * QUERIES);
    const int64_t keys_at = b * c->keys * k_stride + kv * size;
    gather(c->k + keys_at, c->keys, k_stride, size, size, 1.0f, k);
    gather(c->v + keys_at, c->keys, k_stride, size, size, 1.0f, v);
    memset(d_k, 0, sizeof(float) * c->keys * width);
    memset(d_v, 0, sizeof(float) * c->keys * width);
    const int32_t *segments = c->k_segments + b * c->keys;
    const int64_t step = c->causal ? CAUSAL_KEYS : KEYS;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t first = 0; first < c->queries; first += QUERIES) {
            const QueryBlock block = query_block(c, b, first);
            const int count = block.last - block.first + 1;
            const int64_t at = (b * c->queries + first) * q_stride + h * size;
            gather_columns(c->q + at, count, q_stride, size, LOG2_E * scale, q);
            gather_columns(c->d_out + at, count, q_stride, size, 1.0f, d_out);
            gather(c->q + at, count, q_stride, size, width, scale, q_rows);
            gather(c->d_out + at, count, q_stride, size, width, 1.0f, d_out_rows);
            float lse_of[QUERIES], delta_of[QUERIES];
            for (int i = 0; i < QUERIES; i++) {
                lse_of[i] = i < count ? c->lse[(b * c->heads + h) * c->queries + first + i] : -MASKED;
                delta_of[i] = 0.0f;
                for (int64_t j = 0; i < count && j < size; j++)
                    delta_of[i] += c->out[at + i * q_stride + j] * c->d_out[at + i * q_stride + j];
            }
            Vector lse[COLUMNS], delta[COLUMNS];
            for (int j = 0; j < COLUMNS; j++) lse[j] = load(lse_of + j * LANES), delta[j] = load(delta_of + j * LANES);
            memset(d_q, 0, sizeof(float) * size * QUERIES);
            for (int64_t from = 0; from < c->keys; from += step) {
                const int keys = (int)(from + step < c->keys ? step : c->keys - from);
                const int see = visible(c, &block, segments, from, from + keys - 1);
                if (see == NONE) continue;
                product(keys, COLUMNS, (int)size, k + from * size, size, 1, q, QUERIES, s, QUERIES, 0);
                product(keys, COLUMNS, (int)size, v + from * size, size, 1, d_out, QUERIES, d_s, QUERIES, 0);
                for (int i = 0; i < keys; i++)
                    for (int j = 0; j < COLUMNS; j++) {
                        float *p = s + i * QUERIES + j * LANES, *d = d_s + i * QUERIES + j * LANES;
                        Vector weight = power_of_2(load(p) - lse[j]);
                        if (see == SOME)
                            weight = choose(sees(c, &block, segments[from + i], (int32_t)from + i, j), weight, all(0.0f));
                        store(p, weight);
                        store(d, weight * (load(d) - delta[j]));
                    }
                product(keys, vectors, count, s, QUERIES, 1, d_out_rows, width, d_v + from * width, width, 1);
                product(keys, vectors, count, d_s, QUERIES, 1, q_rows, width, d_k + from * width, width, 1);
                product((int)size, COLUMNS, keys, k + from * size, 1, size, d_s, QUERIES, d_q, QUERIES, 1);
            }
            for (int i = 0; i < count; i++)
                for (int64_t j = 0; j < size; j++) c->d_q[at + i * q_stride + j] = d_q[j * QUERIES + i] * scale;
        }
    for (int64_t i = 0; i < c->keys; i++) {
        memcpy(c->d_k + keys_at + i * k_stride, d_k + i * width, sizeof(float) * size);
        memcpy(c->d_v + keys_at + i * k_stride, d_v + i * width, sizeof(float) * size);
    }
}

/* Arguments q, k, v, q_segments, k_segments; attributes, which XLA sorts by name: causal, window. */
static Call read(XLA_FFI_CallFrame *frame) {
    const int64_t *q = argument(frame, 0)->dims, *k = argument(frame, 1)->dims;
    Call c = {.batch = q[0], .queries = q[1], .heads = q[2], .size = q[3], .keys = k[1], .kv_heads = k[2]};
    c.q = argument(frame, 0)->data, c.k = argument(frame, 1)->data, c.v = argument(frame, 2)->data;
    c.q_segments = argument(frame, 3)->data, c.k_segments = argument(frame, 4)->data;
    c.causal = *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
    c.window = *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[1])->value;
    return c;
}

/* A thread is worth waking for about a million multiplications. */
static int64_t threads(const Call *c) { return c->batch * c->heads * c->queries * c->keys * c->size / 500000 + 1; }

/* Results: out, lse (B, H, Q), in powers of two. */
XLA_FFI_Error *fusion_attention_forward(XLA_FFI_CallFrame *frame) {
    if (is_question(frame)) return NULL;
    Call c = read(frame);
    c.result = result(frame, 0), c.d_q = result(frame, 1);
    return run(frame, &c, forward_task, c.batch * c.heads, forward_scratch(&c), threads(&c));
}

/* Further arguments: out, lse, d_out. Results: d_q, d_k, d_v. */
XLA_FFI_Error *fusion_attention_backward(XLA_FFI_CallFrame *frame) {
    if (is_question(frame)) return NULL;
    Call c = read(frame);
    c.out = argument(frame, 5)->data, c.lse = argument(frame, 6)->data, c.d_out = argument(frame, 7)->data;
    c.d_q = result(frame, 0), c.d_k = result(frame, 1), c.d_v = result(frame, 2);
    return run(frame, &c, backward_task, c.batch * c.kv_heads, backward_scratch(&c), threads(&c));
}
