/* Decoding on CPU: attention of one new token over the cache, and products with int8 weights; see cpu_decoding.py.

Both read each byte of the cache or the weights once, where it lies. What a task computes does not depend on the
threads, so that results are the same bit for bit however many there are. */

#include "cpu_kernels.h"

#define SLOTS 64   /* slots of the cache that are attended, or skipped, together */
#define BLOCK 128  /* columns of the weights that a task multiplies */
#define SMALL (1 << 17) /* bytes for which a thread is worth waking */

typedef struct {
    int64_t batch, heads, kv_heads, size, slots;
    const float *q, *keys, *values;
    const int32_t *segments;
    float *out;
} Attention;

INLINE int any(const int32_t *seen, int count) {
    int result = 0;
    for (int j = 0; j < count; j++) result |= seen[j] > 0;
    return result;
}

INLINE Integers visible_slots(const int32_t *seen) { return *(const Integers *)seen > (Integers){0}; }

/* out (group, size) += weights (group, count) values (count, size) */
INLINE void weigh(int group, int count, int64_t size, const float *weights, int64_t width, const float *values, float *out) {
    const int64_t vectors = size / LANES;
    product(group, (int)vectors, count, weights, width, 1, values, size, out, size, 1);
    for (int64_t i = vectors * LANES; i < size; i++)
        for (int g = 0; g < group; g++)
            for (int j = 0; j < count; j++) out[g * size + i] += weights[g * width + j] * values[j * size + i];
}

/* The query heads of one row that share a key/value head. */
static void attention_task(const void *call, int64_t task, float *memory) {
    const Attention *c = call;
    const int64_t b = task / c->kv_heads, kv = task % c->kv_heads, group = c->heads / c->kv_heads, size = c->size;
    const int64_t slots = c->slots, width = (slots + LANES - 1) / LANES * LANES;
    const float *keys = c->keys + task * size * slots, *values = c->values + task * slots * size;
    const float *q = c->q + (b * c->heads + kv * group) * size;
    float *out = c->out + (b * c->heads + kv * group) * size;
    const int32_t *segments = c->segments + b * slots;
    const float scale = LOG2_E / sqrtf((float)size);
    float *scaled = take(&memory, group * size), *scores = take(&memory, group * width);
    for (int64_t i = 0; i < group * size; i++) scaled[i] = q[i] * scale, out[i] = 0.0f;
    /* Of the last few slots, which fill no vector, copies: beyond them are zeros that nothing sees. */
    const int64_t whole = slots / LANES * LANES, rest = slots - whole;
    int32_t *seen = (int32_t *)take(&memory, width);
    float *last_keys = take(&memory, size * LANES), *last_values = take(&memory, LANES * size);
    memset(seen, 0, sizeof(int32_t) * width), memcpy(seen, segments, sizeof(int32_t) * slots);
    memset(last_keys, 0, sizeof(float) * size * LANES), memset(last_values, 0, sizeof(float) * size * LANES);
    for (int64_t i = 0; i < size; i++) memcpy(last_keys + i * LANES, keys + i * slots + whole, sizeof(float) * rest);
    memcpy(last_values, values + whole * size, sizeof(float) * rest * size);

    for (int64_t from = 0; from < width; from += SLOTS) {
        const int count = (int)(from + SLOTS < width ? SLOTS : width - from), inside = from + count > whole && rest ? count - LANES : count;
        if (!any(seen + from, count)) continue;
        product((int)group, inside / LANES, (int)size, scaled, size, 1, keys + from, slots, scores + from, width, 0);
        if (inside < count)
            product((int)group, 1, (int)size, scaled, size, 1, last_keys, LANES, scores + whole, width, 0);
    }
    for (int64_t g = 0; g < group; g++) {
        Vector highest = all(MASKED), sum = all(0.0f);
        float *s = scores + g * width;
        for (int64_t j = 0; j < width; j += LANES) {
            store(s + j, choose(visible_slots(seen + j), load(s + j), all(MASKED)));
            highest = LARGER(highest, load(s + j));
        }
        float peak = MASKED, total = 0.0f;
        for (int i = 0; i < LANES; i++) peak = highest[i] <= peak ? peak : highest[i]; /* NaN stays NaN */
        for (int64_t j = 0; j < width; j += LANES) {
            const Vector weight = choose(visible_slots(seen + j), power_of_2(load(s + j) - all(peak)), all(0.0f));
            store(s + j, weight);
            sum += weight;
        }
        for (int i = 0; i < LANES; i++) total += sum[i];
        for (int64_t j = 0; total != 0.0f && j < width; j += LANES) store(s + j, load(s + j) / all(total));
    }
    for (int64_t from = 0; from < width; from += SLOTS) {
        const int count = (int)(from + SLOTS < width ? SLOTS : width - from), inside = from + count > whole && rest ? count - LANES : count;
        if (!any(seen + from, count)) continue;
        weigh((int)group, inside, size, scores + from, width, values + from * size, out);
        if (inside < count) weigh((int)group, LANES, size, scores + whole, width, last_values, out);
    }
}

/* Arguments q (B, H, d), keys (layers, B, K, d, C), values (layers, B, K, C, d), segments (B, C) and layer; result like q. */
XLA_FFI_Error *fusion_cached_attention(XLA_FFI_CallFrame *frame) {
    if (is_question(frame)) return NULL;
    const int64_t *q = argument(frame, 0)->dims, *keys = argument(frame, 1)->dims;
    Attention c = {.batch = q[0], .heads = q[1], .size = q[2], .kv_heads = keys[2], .slots = keys[4]};
    const int64_t layer = *(const int32_t *)argument(frame, 4)->data, part = c.batch * c.kv_heads * c.size * c.slots;
    c.q = argument(frame, 0)->data, c.segments = argument(frame, 3)->data, c.out = result(frame, 0);
    c.keys = (const float *)argument(frame, 1)->data + layer * part;
    c.values = (const float *)argument(frame, 2)->data + layer * part;
    const int64_t group = c.heads / c.kv_heads, scratch = (group + 1) * (c.size + c.slots + LANES) + 2 * c.size * LANES + 128;
    return run(frame, &c, attention_task, c.batch * c.kv_heads, scratch, part * 8 / SMALL + 1);
}

typedef struct {
    int64_t rows, depth, columns;
    const float *x, *scales;
    const int8_t *weights;
    float *out;
} Product;

INLINE Vector load_integers(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    Vector x;
    for (int i = 0; i < LANES; i++) x[i] = p[i];
    return x;
#endif
}

/* Some rows and columns; their numbers are constant, so that the sums are in registers. */
INLINE void strip(const Product *c, const int rows, const int vectors, int64_t row, int64_t first) {
    Vector sum[8][8];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = all(0.0f);
    for (int64_t k = 0; k < c->depth; k++) {
        Vector right[8];
        UNROLL for (int j = 0; j < vectors; j++) right[j] = load_integers(c->weights + k * c->columns + first + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const Vector left = all(c->x[(row + i) * c->depth + k]);
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            const int64_t at = first + j * LANES;
            store(c->out + (row + i) * c->columns + at, sum[i][j] * load(c->scales + at));
        }
}

static void product_task(const void *call, int64_t task, float *memory) {
    const Product *c = call;
    const int64_t first = task * BLOCK, last = first + BLOCK < c->columns ? first + BLOCK : c->columns;
    int64_t row = 0, j;
    (void)memory;
#define STRIPS(rows, vectors)                                                                                      \
    {                                                                                                              \
        for (j = first; j + vectors * LANES <= last; j += vectors * LANES) strip(c, rows, vectors, row, j);        \
        for (; j + LANES <= last; j += LANES) strip(c, rows, 1, row, j);                                           \
    }
    for (; row + 8 <= c->rows; row += 8) STRIPS(8, 2)
    for (; row + 4 <= c->rows; row += 4) STRIPS(4, 4)
    for (; row < c->rows; row++) STRIPS(1, 8)
#undef STRIPS
    for (j = first + (last - first) / LANES * LANES; j < last; j++)
        for (int64_t i = 0; i < c->rows; i++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < c->depth; k++) sum += c->x[i * c->depth + k] * c->weights[k * c->columns + j];
            c->out[i * c->columns + j] = sum * c->scales[j];
        }
}

/* Arguments x (N, I), int8 weights (I, O) and scales (O,); result (N, O). */
XLA_FFI_Error *fusion_int8_product(XLA_FFI_CallFrame *frame) {
    if (is_question(frame)) return NULL;
    const int64_t *x = argument(frame, 0)->dims;
    Product c = {.rows = x[0], .depth = x[1], .columns = argument(frame, 1)->dims[1]};
    c.x = argument(frame, 0)->data, c.weights = argument(frame, 1)->data, c.scales = argument(frame, 2)->data;
    c.out = result(frame, 0);
    return run(frame, &c, product_task, (c.columns + BLOCK - 1) / BLOCK, 1, c.depth * c.columns / SMALL + 1);
}
