// X^T X of bfloat16 inputs, summed in float32: the products of a CPU's bfloat16 units without their rounding of the sum.
//
// Columns are packed in groups of 16, two tokens of a column side by side, which is what the instructions multiply. A
// part of the result, 8 columns by 48 or, with matrix tiles, 32 by 32, stays in registers over all tokens of a call; a block
// of 64 columns, whose packed inputs stay in the second cache, is multiplied with all others in turn. Only parts on and
// above the diagonal.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512BF16__
namespace {

constexpr int64_t GROUP = 16, DOWN = 8, ACROSS = 3, BLOCK = 64, DEEP = 1024;  // DEEP: tokens at a time
constexpr int64_t CHUNK = 16;                                                 // pairs of tokens of a matrix tile

// Columns of one group, [pair of tokens][column]: two bfloat16 in 32 bits; zeros where there are no more tokens.
void pack(const uint16_t *X, int64_t tokens, int64_t columns, int64_t stride, uint32_t *out, int64_t pairs) {
    for (int64_t pair = 0; pair < pairs; ++pair, out += GROUP) {
        const uint16_t *first = X + 2 * pair * stride, *second = first + stride;
        if (columns == GROUP && 2 * pair + 1 < tokens) {
            for (int64_t j = 0; j < GROUP; ++j) out[j] = (uint32_t)first[j] | (uint32_t)second[j] << 16;
            continue;
        }
        for (int64_t j = 0; j < columns; ++j)
            out[j] = 2 * pair >= tokens ? 0 : (uint32_t)first[j] | (2 * pair + 1 < tokens ? (uint32_t)second[j] << 16 : 0);
    }
}

// Run `work(i)` for every i below `count` on several threads.
template <class Work> void share(int64_t count, int threads, const Work &work) {
    std::atomic<int64_t> next{0};
    in_parts(int(std::min<int64_t>(threads, count)), [&](int) {
        for (int64_t i; (i = next++) < count;) work(i);
    });
}

void tile(const uint32_t *left, const uint32_t *right, int64_t pairs, float *out /* DOWN x ACROSS * GROUP */) {
    __m512 sum[DOWN][ACROSS];
    for (auto &row : sum)
        for (auto &s : row) s = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh b[ACROSS];
        for (int w = 0; w < ACROSS; ++w) b[w] = (__m512bh)_mm512_loadu_si512(right + (w * pairs + pair) * GROUP);
        for (int i = 0; i < DOWN; ++i) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)left[pair * GROUP + i]);
            for (int w = 0; w < ACROSS; ++w) sum[i][w] = _mm512_dpbf16_ps(sum[i][w], a, b[w]);
        }
    }
    for (int i = 0; i < DOWN; ++i)
        for (int w = 0; w < ACROSS; ++w) _mm512_storeu_ps(out + (i * ACROSS + w) * GROUP, sum[i][w]);
}

#if defined(SPARSIGHT_TILES)

// The tiles of a group with its columns as rows: (chunks, 16 columns, 16 pairs).
void transpose(const uint32_t *packed, int64_t chunks, uint32_t *out) {
    const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(GROUP));
    for (int64_t i = 0; i < chunks * GROUP; ++i)
        _mm512_storeu_si512(out + i * CHUNK, _mm512_i32gather_epi32(places, packed + i / GROUP * CHUNK * GROUP + i % GROUP, 4));
}

// Two groups of columns times two; `sums` (2, 2, 16, 16).
void multiply_groups(const uint32_t *left, const uint32_t *right, int64_t chunks, float *sums) {
    const uint32_t *const below = left + chunks * CHUNK * GROUP, *const next = right + chunks * CHUNK * GROUP;
    ordered();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < chunks * CHUNK * GROUP; i += CHUNK * GROUP) {
        _tile_loadd(4, left + i, 64);
        _tile_loadd(6, right + i, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, below + i, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, next + i, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    ordered();
}

// A block of columns, from group `first` on, times all groups from there on.
void multiply_block(const uint32_t *packed, int64_t first, int64_t groups, int64_t chunks, int64_t n, float *G) {
    const int64_t size = chunks * CHUNK * GROUP;
    std::vector<uint32_t> turned(size_t(BLOCK / GROUP * size));
    for (int64_t i = 0; i < BLOCK / GROUP; ++i) transpose(packed + (first + i) * size, chunks, turned.data() + i * size);
    const TileUse use(GROUP);
    alignas(64) float sums[4 * GROUP * GROUP];
    for (int64_t i = 0; i < BLOCK / GROUP; i += 2)
        for (int64_t group = first + i; group < groups; group += 2) {
            multiply_groups(turned.data() + i * size, packed + group * size, chunks, sums);
            for (int64_t part = 0; part < 4; ++part) {
                const int64_t top = (first + i + part / 2) * GROUP, left = (group + part % 2) * GROUP;
                for (int64_t r = 0; r < std::min(GROUP, n - top); ++r)
                    for (int64_t c = 0; c < std::min(GROUP, n - left); ++c)
                        G[(top + r) * n + left + c] += sums[part * GROUP * GROUP + r * GROUP + c];
            }
        }
}

#endif

}  // namespace
#endif

// Add X^T X to the upper triangle of G (n, n) float32; X (tokens, n) bfloat16, rows `stride` apart. 0 where not supported.
extern "C" int sparsight_gram(const uint16_t *X, int64_t tokens, int64_t n, int64_t stride, float *G, int threads) {
#ifdef __AVX512BF16__
    const int64_t groups = (n + GROUP - 1) / GROUP, blocks = (n + BLOCK - 1) / BLOCK;
    for (int64_t start = 0; start < tokens; start += DEEP) {
        const int64_t count = std::min(DEEP, tokens - start);
#if defined(SPARSIGHT_TILES)
        const bool tiles = may_use_tiles();
        const int64_t pairs = tiles ? (count + 2 * CHUNK - 1) / (2 * CHUNK) * CHUNK : (count + 1) / 2;
#else
        const int64_t pairs = (count + 1) / 2;
#endif
        // kept between calls, since fresh memory costs more than the products; what stands beyond the edges is never read
        static thread_local std::vector<uint32_t> kept;
        const size_t needed = (groups + BLOCK / GROUP + ACROSS) * pairs * GROUP;
        if (kept.size() < needed) kept.resize(needed);
        uint32_t *const packed = kept.data();
        share(groups, threads, [&](int64_t group) {
            pack(X + start * stride + group * GROUP, count, std::min(GROUP, n - group * GROUP), stride,
                 packed + group * pairs * GROUP, pairs);
        });
        share(blocks, threads, [&](int64_t block) {
#if defined(SPARSIGHT_TILES)
            if (tiles) return multiply_block(packed, block * BLOCK / GROUP, groups, pairs / CHUNK, n, G);
#endif
            float out[DOWN * ACROSS * GROUP];
            for (int64_t group = block * BLOCK / GROUP; group < groups; group += ACROSS)
                for (int64_t top = block * BLOCK; top < std::min(n, (block + 1) * BLOCK); top += DOWN) {
                    if ((group + ACROSS) * GROUP <= top) continue;  // below the diagonal
                    tile(packed + (top / GROUP) * pairs * GROUP + top % GROUP,
                         packed + group * pairs * GROUP, pairs, out);
                    const int64_t rows = std::min(DOWN, n - top), columns = std::min(ACROSS * GROUP, n - group * GROUP);
                    for (int64_t i = 0; i < rows; ++i) {
                        float *row = G + (top + i) * n + group * GROUP;
                        for (int64_t j = 0; j < columns; ++j) row[j] += out[i * ACROSS * GROUP + j];
                    }
                }
        });
    }
    return 1;
#else
    return 0;
#endif
}
