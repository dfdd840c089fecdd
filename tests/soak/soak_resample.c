/* Resizes the shapes that stdin lists, in buffers of exactly the given sizes; tests/soak/soak_resample.py compiles it with
sanitizers. A shape is one line:
    in_width in_height covered_width covered_height width height tiles stride src_bytes middle_bytes dst_bytes across down
where `across` and `down` are what the two functions must return, and sizes of buffers are at most a few MB.
Prints how many shapes each pair of results had, or the first shape that went wrong. */

#include "resample.c"

#include <stdio.h>

static uint8_t *noise(int64_t bytes, uint32_t *state) {
    uint8_t *made = malloc(bytes > 0 ? bytes : 1);
    for (int64_t i = 0; i < bytes; i++) {
        *state = *state * 1664525u + 1013904223u;
        made[i] = *state & 256 ? *state >> 24 : *state & 512 ? 255 : 0; /* extremes, so that the cubic overshoots */
    }
    return made;
}

int main(void) {
    int width, height, out_width, out_height, tiles, want_across, want_down;
    double covered_width, covered_height;
    long long stride, src_bytes, middle_bytes, dst_bytes;
    long counts[4][4] = {{0}}, line = 0;
    uint32_t state = 1;
    while (scanf("%d %d %lf %lf %d %d %d %lld %lld %lld %lld %d %d", &width, &height, &covered_width, &covered_height,
                 &out_width, &out_height, &tiles, &stride, &src_bytes, &middle_bytes, &dst_bytes, &want_across,
                 &want_down) == 13) {
        line++;
        uint8_t *src = noise(src_bytes, &state), *middle[2], *dst[2];
        int across = DONE, down = DONE, same = 1;
        for (int plain = 0; plain < 2; plain++) {
            middle[plain] = noise(middle_bytes, &state);
            dst[plain] = noise(dst_bytes, &state);
            across = fusion_across(src, src_bytes, width, covered_width, height, middle[plain], middle_bytes, stride,
                                   out_width, plain);
            if (across != want_across) same = 0;
        }
        for (long long y = 0; across == DONE && y < height; y++)
            if (memcmp(middle[0] + y * stride, middle[1] + y * stride, 3 * (size_t)out_width)) same = 0;
        for (int plain = 0; plain < 2; plain++) {
            down = fusion_down(middle[0], middle_bytes, stride, height, covered_height, dst[plain], dst_bytes, out_width,
                               out_height, tiles, plain);
            if (down != want_down) same = 0;
        }
        if (down == DONE && memcmp(dst[0], dst[1], 3 * (size_t)out_width * out_height)) same = 0;
        if (!same) {
            printf("shape %ld: across %d (%d expected), down %d (%d expected), or pixels that differ\n", line, across,
                   want_across, down, want_down);
            return 1;
        }
        counts[across][down]++;
        free(src);
        for (int plain = 0; plain < 2; plain++) free(middle[plain]), free(dst[plain]);
    }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++)
            if (counts[i][k]) printf("%d %d %ld\n", i, k, counts[i][k]);
    return 0;
}
