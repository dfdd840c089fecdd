/* Bicubic resizing of RGB with antialiasing: the bytes that Pillow makes, several times as fast; see resample.py.

Pillow's arithmetic, which every line here has to keep:
- Output pixel i reads the inputs within 2 * max(1, in / out) of its centre (i + 0.5) * in / out, through the cubic
  of a = -0.5.
- Weights are normalised in double and rounded, halves away from zero, to integers of 22 fractional bits.
- Sums are integers; half is added, 22 bits are dropped, and what is outside 0 to 255 is clipped.
- Along rows first, then down columns, with 8 bits in between.

For AVX2 a weight w of up to 24 bits is split in two that fit 16: w = (w >> 11) * 2048 + (w & 2047). One instruction
then multiplies and adds 16 pairs, twice, instead of 8 slow products of 32 bits. Sums may wrap on the way: the result,
taken modulo 2^32, fits 32 bits. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#include <immintrin.h>
#endif

#define BITS 22
#define HALF (1 << (BITS - 1))
#define SPLIT 11
#define GROUP 4 /* weights are padded with zeros to a multiple of this */

/* What the two functions at the end return. */
enum { DONE = 0, NO_MEMORY = 1, BAD_SIZE = 2, TOO_SMALL = 3 };
#define LARGEST (1 << 24) /* of a side in pixels: products of two sides and a pixel's bytes then fit 64 bits */

typedef struct {
    int taps;    /* weights per output: the largest count, padded */
    int *first;  /* (out): the first input that an output reads */
    int *weight; /* (out, taps): times 2^22 */
    int *pairs;  /* (out, taps / 2, 2): upper parts of two weights in one int, and lower parts in the next */
} Weights;

static double cubic(double x) {
    if (x < 0.0) x = -x;
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

static void free_weights(Weights *w) {
    free(w->first);
    free(w->weight);
    free(w->pairs);
}

/* For the first `covered` of `in` pixels, a whole number or not. Returns DONE or NO_MEMORY. */
static int make_weights(Weights *w, int in, double covered, int out) {
    const double scale = covered / out, stretch = scale < 1.0 ? 1.0 : scale, support = 2.0 * stretch;
    int longest = 1;
    for (int i = 0; i < out; i++) {
        const double centre = (i + 0.5) * scale;
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        if (from < 0) from = 0;
        if (to > in) to = in;
        if (to - from > longest) longest = to - from;
    }
    w->taps = (longest + GROUP - 1) / GROUP * GROUP;
    const size_t count = (size_t)out * w->taps;
    w->first = malloc(out * sizeof(int));
    w->weight = calloc(count, sizeof(int));
    w->pairs = malloc(count * sizeof(int));
    double *exact = malloc(longest * sizeof(double));
    if (!w->first || !w->weight || !w->pairs || !exact) {
        free(exact);
        return NO_MEMORY;
    }
    for (int i = 0; i < out; i++) {
        const double centre = (i + 0.5) * scale, per_pixel = 1.0 / stretch;
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        if (from < 0) from = 0;
        if (to > in) to = in;
        double sum = 0.0;
        for (int k = 0; k < to - from; k++) sum += exact[k] = cubic((k + from - centre + 0.5) * per_pixel);
        /* Windows that would leave the input with their padding begin earlier, with zeros in front. */
        int first = from + w->taps <= in ? from : in - w->taps;
        if (first < 0) first = from;
        int *weight = w->weight + (size_t)i * w->taps + (from - first);
        for (int k = 0; k < to - from; k++) {
            const double value = (sum != 0.0 ? exact[k] / sum : exact[k]) * (1 << BITS);
            weight[k] = (int)(value < 0 ? value - 0.5 : value + 0.5);
        }
        w->first[i] = first;
    }
    for (size_t k = 0; k < count; k += 2) {
        const int a = w->weight[k], b = w->weight[k + 1], low = (1 << SPLIT) - 1;
        w->pairs[k] = (int)(((uint32_t)(a >> SPLIT) & 0xffff) | (uint32_t)(b >> SPLIT) << 16);
        w->pairs[k + 1] = (a & low) | (b & low) << 16;
    }
    free(exact);
    return DONE;
}

static uint8_t clip(int sum) {
    const int value = sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

/* A row of 4-byte pixels becomes one of `out` 3-byte pixels. Weights beyond the row's end, all zeros, are not read. */
static void across_plain(const uint8_t *src, int in, const Weights *w, int out, uint8_t *dst) {
    for (int i = 0; i < out; i++) {
        const int *weight = w->weight + (size_t)i * w->taps, first = w->first[i];
        const int taps = first + w->taps <= in ? w->taps : in - first;
        int red = HALF, green = HALF, blue = HALF;
        for (int k = 0; k < taps; k++) {
            const uint8_t *pixel = src + 4 * (size_t)(first + k);
            red += pixel[0] * weight[k];
            green += pixel[1] * weight[k];
            blue += pixel[2] * weight[k];
        }
        dst[3 * i] = clip(red);
        dst[3 * i + 1] = clip(green);
        dst[3 * i + 2] = clip(blue);
    }
}

/* One row of `bytes` bytes from `taps` rows. */
static void down_plain(const uint8_t *src, size_t stride, const int *weight, int taps, int bytes, uint8_t *dst) {
    for (int from = 0; from < bytes; from += 64) {
        const int many = bytes - from < 64 ? bytes - from : 64;
        int sums[64];
        for (int x = 0; x < many; x++) sums[x] = HALF;
        for (int k = 0; k < taps; k++) {
            const uint8_t *row = src + k * stride + from;
            for (int x = 0; x < many; x++) sums[x] += row[x] * weight[k];
        }
        for (int x = 0; x < many; x++) dst[from + x] = clip(sums[x]);
    }
}

#ifdef HAVE_AVX2
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i joined(__m256i upper, __m256i lower) {
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(upper, SPLIT), lower);
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(HALF)), BITS);
}

/* Two rows at once, one in each half of the registers. Each `dst` needs one byte more than its pixels. */
AVX2 static void across_avx2(const uint8_t *a, const uint8_t *b, const Weights *w, int out, uint8_t *to_a,
                             uint8_t *to_b) {
    /* Of four pixels, the first two and the last two, channel beside channel, widened to 16 bits. */
    const __m256i first_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i last_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const int *pairs = w->pairs;
    for (int i = 0; i < out; i++) {
        const uint8_t *from_a = a + 4 * (size_t)w->first[i], *from_b = b + 4 * (size_t)w->first[i];
        __m256i upper = _mm256_setzero_si256(), lower = upper;
        for (int k = 0; k < w->taps; k += 4, pairs += 4, from_a += 16, from_b += 16) {
            const __m256i four = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)from_a)),
                _mm_loadu_si128((const __m128i *)from_b), 1);
            const __m256i x = _mm256_shuffle_epi8(four, first_two), y = _mm256_shuffle_epi8(four, last_two);
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(x, _mm256_set1_epi32(pairs[0])));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(x, _mm256_set1_epi32(pairs[1])));
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(y, _mm256_set1_epi32(pairs[2])));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(y, _mm256_set1_epi32(pairs[3])));
        }
        __m256i sum = joined(upper, lower);
        sum = _mm256_packs_epi32(sum, sum);
        sum = _mm256_packus_epi16(sum, sum);
        const int pixel_a = _mm256_extract_epi32(sum, 0), pixel_b = _mm256_extract_epi32(sum, 4);
        memcpy(to_a + 3 * (size_t)i, &pixel_a, 4); /* the fourth byte is overwritten next, or is spare */
        memcpy(to_b + 3 * (size_t)i, &pixel_b, 4);
    }
}

/* As down_plain, at least 32 bytes wide. */
AVX2 static void down_avx2(const uint8_t *src, size_t stride, const int *pairs, int taps, int bytes, uint8_t *dst) {
    const __m256i zero = _mm256_setzero_si256();
    for (int x = 0; x < bytes; x += 32) {
        if (x > bytes - 32) x = bytes - 32; /* some bytes twice, in place of a special end */
        __m256i upper[4] = {zero, zero, zero, zero}, lower[4] = {zero, zero, zero, zero};
        for (int k = 0; k < taps; k += 2) {
            const __m256i a = _mm256_loadu_si256((const __m256i *)(src + k * stride + x));
            const __m256i b = _mm256_loadu_si256((const __m256i *)(src + (k + 1) * stride + x));
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            const __m256i part[4] = {
                _mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
            const __m256i above = _mm256_set1_epi32(pairs[k]), below = _mm256_set1_epi32(pairs[k + 1]);
            for (int p = 0; p < 4; p++) {
                upper[p] = _mm256_add_epi32(upper[p], _mm256_madd_epi16(part[p], above));
                lower[p] = _mm256_add_epi32(lower[p], _mm256_madd_epi16(part[p], below));
            }
        }
        const __m256i low = _mm256_packs_epi32(joined(upper[0], lower[0]), joined(upper[1], lower[1]));
        const __m256i high = _mm256_packs_epi32(joined(upper[2], lower[2]), joined(upper[3], lower[3]));
        _mm256_storeu_si256((__m256i *)(dst + x), _mm256_packus_epi16(low, high));
    }
}
#endif

static int is_side(int64_t pixels) { return pixels >= 1 && pixels <= LARGEST; }

/* Whether the image may cover that much of `in` pixels. False for what is no number. */
static int is_part(double covered, int in) { return isfinite(covered) && covered > 0.0 && covered <= in; }

/* Whether a buffer holds `rows` rows of `row` bytes that begin `stride` bytes apart. */
static int holds(int64_t bytes, int64_t rows, int64_t stride, int64_t row) {
    return stride >= row && stride <= INT64_MAX / LARGEST && bytes >= (rows - 1) * stride + row;
}

/* Rows of (rows, in, 4) bytes, the fourth byte unused, become rows of `out` pixels of 3 bytes and a spare one in `dst`,
which begin `stride` bytes apart. The image covers `covered` of the `in` pixels. `src_bytes` and `dst_bytes` are what the
buffers really have. `plain` leaves AVX2 aside.
Returns DONE, NO_MEMORY, BAD_SIZE or TOO_SMALL (a buffer); nothing is read or written unless all of it fits. */
int fusion_across(const uint8_t *src, int64_t src_bytes, int in, double covered, int rows, uint8_t *dst,
                  int64_t dst_bytes, int64_t stride, int out, int plain) {
    if (!src || !dst || !is_side(in) || !is_side(rows) || !is_side(out) || !is_part(covered, in)) return BAD_SIZE;
    if (!holds(src_bytes, rows, 4 * (int64_t)in, 4 * (int64_t)in)) return TOO_SMALL;
    if (!holds(dst_bytes, rows, stride, 3 * (int64_t)out + 1)) return TOO_SMALL;
    Weights w = {0};
    const int failed = make_weights(&w, in, covered, out);
    const size_t step = (size_t)in * 4;
#ifdef HAVE_AVX2
    if (!plain && w.taps <= in && __builtin_cpu_supports("avx2")) {
        for (int y = 0; y < rows && !failed; y += 2) {
            const int next = y + 1 < rows ? y + 1 : y;
            across_avx2(src + y * step, src + next * step, &w, out, dst + y * stride, dst + next * stride);
        }
        rows = 0;
    }
#endif
    for (int y = 0; y < rows && !failed; y++) across_plain(src + y * step, in, &w, out, dst + y * stride);
    free_weights(&w);
    (void)plain;
    return failed;
}

/* The rows that fusion_across made, `in` of them, become `height` rows of `width` pixels, cut into tiles:
dst is (tiles * tiles, height / tiles, width / tiles, 3), row by row of tiles. The rest is as there. */
int fusion_down(const uint8_t *src, int64_t src_bytes, int64_t stride, int in, double covered, uint8_t *dst,
                int64_t dst_bytes, int width, int height, int tiles, int plain) {
    if (!src || !dst || !is_side(in) || !is_side(width) || !is_side(height) || !is_part(covered, in)) return BAD_SIZE;
    if (tiles < 1 || width % tiles || height % tiles) return BAD_SIZE;
    if (!holds(src_bytes, in, stride, 3 * (int64_t)width)) return TOO_SMALL;
    if (!holds(dst_bytes, height, 3 * (int64_t)width, 3 * (int64_t)width)) return TOO_SMALL;
    Weights w = {0};
    const int failed = make_weights(&w, in, covered, height);
    const int tile_height = height / tiles, bytes = width / tiles * 3;
    int avx2 = 0;
#ifdef HAVE_AVX2
    avx2 = !plain && bytes >= 32 && w.taps <= in && __builtin_cpu_supports("avx2");
#endif
    for (int y = 0; y < height && !failed; y++) {
        const size_t weights = (size_t)y * w.taps;
        const int first = w.first[y], taps = first + w.taps <= in ? w.taps : in - first;
        for (int t = 0; t < tiles; t++) {
            const uint8_t *from = src + first * stride + (size_t)t * bytes;
            const size_t tile = (size_t)(y / tile_height) * tiles + t;
            uint8_t *to = dst + (tile * tile_height + y % tile_height) * bytes;
#ifdef HAVE_AVX2
            if (avx2) {
                down_avx2(from, stride, w.pairs + weights, taps, bytes, to);
                continue;
            }
#endif
            down_plain(from, stride, w.weight + weights, taps, bytes, to);
        }
    }
    (void)avx2, (void)plain;
    free_weights(&w);
    return failed;
}
