// X^T X of bfloat16 inputs, summed in float32: the products of a CPU's bfloat16 units without their rounding of the sum.
//
// Columns are packed in groups of 16, two tokens of a column side by side, which is what the instruction multiplies. A
// tile of the result, 8 columns by 48, stays in registers over all tokens of a call. Only tiles on and above the diagonal.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512BF16__
namespace {

constexpr int64_t GROUP = 16, HIGH = 8, WIDE = 3, DEEP = 1024;  // DEEP: tokens at a time

// packed[group][pair of tokens][column of the group]: two bfloat16 in 32 bits; zero beyond the edges
void pack(const uint16_t *X, int64_t tokens, int64_t n, int64_t stride, uint32_t *packed, int64_t pairs) {
    for (int64_t group = 0; group * GROUP < n; ++group) {
        const int64_t columns = std::min(GROUP, n - group * GROUP);
        for (int64_t pair = 0; pair < pairs; ++pair) {
            uint32_t *out = packed + (group * pairs + pair) * GROUP;
            const uint16_t *first = X + 2 * pair * stride + group * GROUP, *second = first + stride;
            const bool both = 2 * pair + 1 < tokens;
            for (int64_t j = 0; j < GROUP; ++j)
                out[j] = j < columns ? (uint32_t)first[j] | (both ? (uint32_t)second[j] << 16 : 0) : 0;
        }
    }
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
    const int64_t groups = (n + GROUP - 1) / GROUP, bands = (n + HIGH - 1) / HIGH;
    for (int64_t start = 0; start < tokens; start += DEEP) {
        const int64_t count = std::min(DEEP, tokens - start), pairs = (count + 1) / 2;
        std::vector<uint32_t> packed((groups + WIDE) * pairs * GROUP, 0);
        pack(X + start * stride, count, n, stride, packed.data(), pairs);
        std::atomic<int64_t> next{0};
        auto work = [&] {
            std::vector<float> out(HIGH * WIDE * GROUP);
            for (int64_t band; (band = next++) < bands;) {
                const int64_t top = band * HIGH, rows = std::min(HIGH, n - top);
                const uint32_t *left = packed.data() + (top / GROUP) * pairs * GROUP + top % GROUP;
                for (int64_t group = top / GROUP; group < groups; group += WIDE) {
                    tile(left, packed.data() + group * pairs * GROUP, pairs, out.data());
                    const int64_t columns = std::min(WIDE * GROUP, n - group * GROUP);
                    for (int64_t i = 0; i < rows; ++i) {
                        float *row = G + (top + i) * n + group * GROUP;
                        for (int64_t j = 0; j < columns; ++j) row[j] += out[i * WIDE * GROUP + j];
                    }
                }
            }
        };
        std::vector<std::thread> team;
        for (int i = 1; i < threads; ++i) team.emplace_back(work);
        work();
        for (auto &thread : team) thread.join();
    }
    return 1;
#else
    return 0;
#endif
}
