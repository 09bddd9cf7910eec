// Weights that are stored as a bitmask and the values it keeps, and how products walk them.
//
// A row of bits starts on a byte, lowest bit first; the kept values of all rows lie one behind the other, and `offset[r]` is
// where those of row r begin. The values are read at a place that a popcount decides, which no hardware prefetcher follows:
// they are prefetched here.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"

#if defined(SPARSIGHT_PLAIN)  // no instructions of its own, for tests
#elif defined(__AVX512VBMI2__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SPARSIGHT_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SPARSIGHT_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define SPARSIGHT_NEON 1
#include <arm_neon.h>
#endif

namespace {

enum Type { FLOAT, BRAIN, HALVES };  // as in build.py

constexpr int64_t AHEAD = 2048;      // bytes of values to prefetch
constexpr int64_t SHARE = 1 << 20;   // weights that pay for a thread
constexpr int64_t CACHE = 1 << 19;   // weights that stay in a cache between passes
constexpr int LANES = 16, STREAMS = 4, MOST = 4;  // lanes of a sum, rows and tokens at a time

template <class T> inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline uint64_t load_bits(const uint8_t* from, int64_t bytes) {
    uint64_t bits = 0;
    std::memcpy(&bits, from, size_t(bytes));
    return bits;
}

inline int count(uint64_t bits) { return __builtin_popcountll(bits); }

inline float as_float(uint32_t bits) { return load<float>(&bits); }
inline uint32_t as_bits(float value) { return load<uint32_t>(&value); }

inline float fused(float a, float b, float sum) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, sum);
#else
    return a * b + sum;
#endif
}

inline float of_brain(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

inline uint16_t to_brain(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float of_half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = float(fraction) * 0x1p-24f;
    return sign ? -small : small;
}

inline uint16_t to_half(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(as_float(rest) * 0x1p24f)));
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

template <int TYPE> struct Stored;
template <> struct Stored<FLOAT> {
    using type = float;
    static float wide(float value) { return value; }
    static float narrow(float value) { return value; }
};
template <> struct Stored<BRAIN> {
    using type = uint16_t;
    static float wide(uint16_t value) { return of_brain(value); }
    static uint16_t narrow(float value) { return to_brain(value); }
};
template <> struct Stored<HALVES> {
    using type = uint16_t;
    static float wide(uint16_t value) { return of_half(value); }
    static uint16_t narrow(float value) { return to_half(value); }
};

struct Matrix {
    const void* values;
    const uint8_t* bits;
    const int64_t* offset;  // (rows + 1,)
    int64_t rows, columns;

    int64_t pitch() const { return (columns + 7) / 8; }  // bytes of a row of bits
};

// Run `work(first, last)` on equal parts of `rows`, each a whole number of `step` but the last.
template <class Work> void share(int64_t rows, int64_t columns, int64_t step, int threads, const Work& work) {
    const int64_t steps = (rows + step - 1) / step;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, steps, rows * columns / SHARE}));
    in_parts(int(parts), [&](int part) { work(steps * part / parts * step, std::min(rows, steps * (part + 1) / parts * step)); });
}

inline float halves(const float* lanes) {  // the sum of sixteen lanes
    float sum[LANES];
    std::memcpy(sum, lanes, sizeof sum);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

#if defined(SPARSIGHT_AVX512)
inline float halves(__m512 sum) {
    alignas(64) float lanes[LANES];
    _mm512_store_ps(lanes, sum);
    return halves(lanes);
}
#endif

// For every byte of bits: where its kept values lie, as places of 8-bit values and as bytes of 16-bit values; 0x80 gives zero.
struct Shuffles {
    alignas(16) uint8_t of[256][16];
    alignas(8) uint8_t small[256][8];
    Shuffles() {
        for (int byte = 0; byte < 256; byte++) {
            int next = 0;
            for (int bit = 0; bit < 8; bit++) {
                const bool kept = byte >> bit & 1;
                small[byte][bit] = kept ? uint8_t(next) : 0x80;
                of[byte][2 * bit] = kept ? uint8_t(2 * next) : 0x80;
                of[byte][2 * bit + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
                next += kept;
            }
        }
    }
};
#if defined(SPARSIGHT_AVX2) || defined(SPARSIGHT_NEON)
const Shuffles shuffles;
#endif

#if defined(SPARSIGHT_AVX512)

// Expansion in place: the instruction waits for what its target held before, and from memory AMD runs it in microcode. Both
// cost a factor of two and more, and a compiler that is free to choose does either.
inline __m512i expand_words(__mmask32 bits, __m512i values) {
    __asm__("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(bits));
    return values;
}

inline __m512i expand_bytes(__mmask64 bits, __m512i values) {
    __asm__("vpexpandb %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(bits));
    return values;
}

inline __m512i expand_longs(__mmask16 bits, __m512i values) {
    __asm__("vpexpandd %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(bits));
    return values;
}

#endif

inline void prefetch(const void* values) { __builtin_prefetch((const char*)values + AHEAD, 0, 3); }

#if defined(SPARSIGHT_AVX2)
inline void spread(const uint16_t* values, uint8_t byte, uint16_t* to) {
    const __m128i shuffle = _mm_load_si128((const __m128i*)shuffles.of[byte]);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), shuffle));
}
inline void spread(const uint8_t* values, uint8_t byte, uint8_t* to) {
    const __m128i shuffle = _mm_loadl_epi64((const __m128i*)shuffles.small[byte]);
    _mm_storel_epi64((__m128i*)to, _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values), shuffle));
}
#elif defined(SPARSIGHT_NEON)
inline void spread(const uint16_t* values, uint8_t byte, uint16_t* to) {
    vst1q_u8((uint8_t*)to, vqtbl1q_u8(vld1q_u8((const uint8_t*)values), vld1q_u8(shuffles.of[byte])));
}
inline void spread(const uint8_t* values, uint8_t byte, uint8_t* to) {
    vst1_u8(to, vtbl1_u8(vld1_u8(values), vld1_u8(shuffles.small[byte])));
}
#endif

// Dense rows of values of `Value`, zero where the bits are.
template <class Value> void expand_rows(const Matrix& m, int64_t first, int64_t last, Value* out) {
    [[maybe_unused]] const Value* const end = (const Value*)m.values + m.offset[m.rows];
    for (int64_t row = first; row < last; row++) {
        const Value* values = (const Value*)m.values + m.offset[row];
        const uint8_t* bits = m.bits + row * m.pitch();
        Value* to = out + (row - first) * m.columns;
        int64_t c = 0;
#if defined(SPARSIGHT_AVX512)
        constexpr int64_t STEP = 64 / sizeof(Value);
        for (; c + STEP <= m.columns && end - values >= STEP; c += STEP) {
            prefetch(values);
            const __m512i v = _mm512_loadu_si512(values);
            if constexpr (sizeof(Value) == 1) {
                const uint64_t mask = load<uint64_t>(bits + c / 8);
                _mm512_storeu_si512(to + c, expand_bytes(mask, v));
                values += count(mask);
            } else if constexpr (sizeof(Value) == 2) {
                const uint32_t mask = load<uint32_t>(bits + c / 8);
                _mm512_storeu_si512(to + c, expand_words(mask, v));
                values += count(mask);
            } else {
                const uint16_t mask = load<uint16_t>(bits + c / 8);
                _mm512_storeu_si512(to + c, expand_longs(mask, v));
                values += count(mask);
            }
        }
#elif defined(SPARSIGHT_AVX2) || defined(SPARSIGHT_NEON)
        if constexpr (sizeof(Value) <= 2)
            for (; c + 64 <= m.columns && end - values >= 64; c += 64) {
                uint64_t mask = load<uint64_t>(bits + c / 8);
                prefetch(values);
                if (sizeof(Value) == 2) prefetch(values + 32);
                #pragma GCC unroll 8
                for (int i = 0; i < 64; i += 8, mask >>= 8) {
                    spread(values, uint8_t(mask), to + c + i);
                    values += count(mask & 255);
                }
            }
#endif
        for (; c < m.columns; c++) to[c] = bits[c / 8] >> c % 8 & 1 ? *values++ : Value(0);
    }
}

// What becomes of the sum of a row and a token.
template <int TYPE> struct Output {
    typename Stored<TYPE>::type* to;
    const typename Stored<TYPE>::type* bias;
    int64_t rows;
    void put(int64_t row, int64_t token, float sum, float scale = 1) const {
        to[token * rows + row] = Stored<TYPE>::narrow(bias ? fused(sum, scale, Stored<TYPE>::wide(bias[row])) : sum * scale);
    }
};

enum Kind { DENSE, SPARSE, CLOSE };  // CLOSE: sparse, and the values may end within a step

// All rows from `first` to `last`, `R` at a time: one of each R-th part, so that every part is one stream of values and bits.
template <bool ALL, int R, int STEP, class Group>
void walk_rows(const Matrix& m, int64_t first, int64_t last, const Group& group) {
    const int64_t apart = (last - first) / R, end = m.offset ? m.offset[m.rows] - STEP : 0;
    for (int64_t row = first; row < first + apart; row++) {
        if constexpr (ALL) {
            group.template run<DENSE, R>(row, apart);
        } else if (m.offset[row + (R - 1) * apart + 1] <= end) {
            group.template run<SPARSE, R>(row, apart);
        } else {
            for (int r = 0; r < R; r++) group.template run<CLOSE, 1>(row + r * apart, 0);
        }
    }
    for (int64_t row = first + R * apart; row < last; row++) group.template run<ALL ? DENSE : CLOSE, 1>(row, 0);
}

// Memory that starts on a cache line.
template <class T> struct Lines {
    std::vector<T> room;
    T* start;
    explicit Lines(int64_t size) : room(size_t(size) + 64 / sizeof(T)) {
        start = (T*)((uintptr_t(room.data()) + 63) / 64 * 64);
    }
};

// Run `some(first, last)` on rows few enough to stay in a cache for all tokens; all at once where one pass is enough.
template <class Some> void walk_blocks(int64_t first, int64_t last, int64_t columns, int64_t tokens, const Some& some) {
    const int64_t few = std::max<int64_t>(4 * STREAMS, CACHE / columns / STREAMS * STREAMS);
    const int64_t step = tokens <= MOST ? last - first : few;
    for (int64_t from = first; from < last; from += step) some(from, std::min(last, from + step));
}

// Run `some(token, std::integral_constant<int, T>)` on all tokens, four, two or one at a time: more inputs of
// many columns would not fit into the first cache.
template <class Some> void walk_tokens(int64_t tokens, const Some& some) {  // inputs of a group lie together, chunk by chunk
    int64_t token = 0;
    for (; tokens - token >= MOST; token += MOST) some(token, std::integral_constant<int, MOST>());
    if (tokens - token >= 2) some(token, std::integral_constant<int, 2>()), token += 2;
    if (tokens - token >= 1) some(token, std::integral_constant<int, 1>());
}

}  // namespace
