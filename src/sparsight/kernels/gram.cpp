// X^T X of bfloat16 inputs, summed in float32: the products of a CPU's bfloat16 units without their rounding of the sum.
//
// Columns are packed in groups of 16, two tokens of a column side by side, which is what the instruction multiplies. A
// tile of the result, 8 columns by 48, stays in registers over all tokens of a call; a block of 64 columns, whose packed
// inputs stay in the second cache, is multiplied with all others in turn. Only tiles on and above the diagonal.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512BF16__
namespace {

constexpr int64_t GROUP = 16, HIGH = 8, WIDE = 3, BLOCK = 64, DEEP = 1024;  // DEEP: tokens at a time

// Columns of one group, [pair of tokens][column]: two bfloat16 in 32 bits.
void pack(const uint16_t *X, int64_t tokens, int64_t columns, int64_t stride, uint32_t *out, int64_t pairs) {
    for (int64_t pair = 0; pair < pairs; ++pair, out += GROUP) {
        const uint16_t *first = X + 2 * pair * stride, *second = first + stride;
        if (columns == GROUP && 2 * pair + 1 < tokens) {
            for (int64_t j = 0; j < GROUP; ++j) out[j] = (uint32_t)first[j] | (uint32_t)second[j] << 16;
            continue;
        }
        for (int64_t j = 0; j < columns; ++j)
            out[j] = (uint32_t)first[j] | (2 * pair + 1 < tokens ? (uint32_t)second[j] << 16 : 0);
    }
}

// Run `work(i)` for every i below `count` on several threads.
template <class Work> void share(int64_t count, int threads, const Work &work) {
    std::atomic<int64_t> next{0};
    in_parts(int(std::min<int64_t>(threads, count)), [&](int) {
        for (int64_t i; (i = next++) < count;) work(i);
    });
}

void tile(const uint32_t *left, const uint32_t *right, int64_t pairs, float *out /* HIGH x WIDE * GROUP */) {
    __m512 sum[HIGH][WIDE];
    for (auto &row : sum)
        for (auto &s : row) s = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh b[WIDE];
        for (int w = 0; w < WIDE; ++w) b[w] = (__m512bh)_mm512_loadu_si512(right + (w * pairs + pair) * GROUP);
        for (int i = 0; i < HIGH; ++i) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)left[pair * GROUP + i]);
            for (int w = 0; w < WIDE; ++w) sum[i][w] = _mm512_dpbf16_ps(sum[i][w], a, b[w]);
        }
    }
    for (int i = 0; i < HIGH; ++i)
        for (int w = 0; w < WIDE; ++w) _mm512_storeu_ps(out + (i * WIDE + w) * GROUP, sum[i][w]);
}

}  // namespace
#endif

// Add X^T X to the upper triangle of G (n, n) float32; X (tokens, n) bfloat16, rows `stride` apart. 0 where not supported.
extern "C" int sparsight_gram(const uint16_t *X, int64_t tokens, int64_t n, int64_t stride, float *G, int threads) {
#ifdef __AVX512BF16__
    const int64_t groups = (n + GROUP - 1) / GROUP, blocks = (n + BLOCK - 1) / BLOCK;
    for (int64_t start = 0; start < tokens; start += DEEP) {
        const int64_t count = std::min(DEEP, tokens - start), pairs = (count + 1) / 2;
        // kept between calls, since fresh memory costs more than the products; what stands beyond the edges is never read
        static thread_local std::vector<uint32_t> kept;
        const size_t needed = (groups + BLOCK / GROUP + WIDE) * pairs * GROUP;
        if (kept.size() < needed) kept.resize(needed);
        uint32_t *const packed = kept.data();
        share(groups, threads, [&](int64_t group) {
            pack(X + start * stride + group * GROUP, count, std::min(GROUP, n - group * GROUP), stride,
                 packed + group * pairs * GROUP, pairs);
        });
        share(blocks, threads, [&](int64_t block) {
            float out[HIGH * WIDE * GROUP];
            for (int64_t group = block * BLOCK / GROUP; group < groups; group += WIDE)
                for (int64_t top = block * BLOCK; top < std::min(n, (block + 1) * BLOCK); top += HIGH) {
                    if ((group + WIDE) * GROUP <= top) continue;  // below the diagonal
                    tile(packed + (top / GROUP) * pairs * GROUP + top % GROUP,
                         packed + group * pairs * GROUP, pairs, out);
                    const int64_t rows = std::min(HIGH, n - top), columns = std::min(WIDE * GROUP, n - group * GROUP);
                    for (int64_t i = 0; i < rows; ++i) {
                        float *row = G + (top + i) * n + group * GROUP;
                        for (int64_t j = 0; j < columns; ++j) row[j] += out[i * WIDE * GROUP + j];
                    }
                }
        });
    }
    return 1;
#else
    return 0;
#endif
}
