// Products with packed weights in float32, bfloat16 and float16. Inputs are copied once, padded with
// zeros to whole steps, and in the order in which they are read: (chunks, T, columns of a chunk) for each group of T tokens.
//
// Sums of float32, float16 and, without AVX-512, bfloat16: sixteen lanes, column c in lane c % 16, fused multiply-adds, lanes
// added in halves: the same bits on every CPU that has fused multiply-adds. AVX-512 adds bfloat16 in pairs.

#include "packed.h"

namespace {

// Sixteen columns of a row, of any stored type, expanded to float32 and multiplied into the sums of `T` tokens. `left` says
// how many values may be read at `values`.

#if defined(SPARSIGHT_AVX512)

struct Lanes {
    __m512 sum = _mm512_setzero_ps();
    void add(__m512 w, const float* x) { sum = _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum); }
    float total() const { return halves(sum); }
};

template <int TYPE> inline __m512 expand16(const typename Stored<TYPE>::type* values, uint32_t bits, int64_t left) {
    const int kept = count(bits);
    if constexpr (TYPE == FLOAT) {
        const __m512i v = left >= LANES ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi32(__mmask16((1u << kept) - 1), values);
        return _mm512_castsi512_ps(expand_longs(__mmask16(bits), v));
    } else {
        const __m256i v = left >= LANES ? _mm256_loadu_si256((const __m256i*)values)
                                        : _mm256_maskz_loadu_epi16(__mmask16((1u << kept) - 1), values);
        const __m256i w = _mm512_castsi512_si256(expand_words(bits, _mm512_castsi256_si512(v)));
        if constexpr (TYPE == HALVES) return _mm512_cvtph_ps(w);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
    }
}

#elif defined(SPARSIGHT_AVX2)

struct Wide {
    __m256 low, high;
};

struct Lanes {
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    void add(Wide w, const float* x) {
        low = _mm256_fmadd_ps(w.low, _mm256_loadu_ps(x), low);
        high = _mm256_fmadd_ps(w.high, _mm256_loadu_ps(x + 8), high);
    }
    float total() const {
        alignas(32) float lanes[LANES];
        _mm256_store_ps(lanes, low);
        _mm256_store_ps(lanes + 8, high);
        return halves(lanes);
    }
};

template <int TYPE> inline __m256 expand8(const typename Stored<TYPE>::type* values, uint32_t byte, int64_t left) {
    typename Stored<TYPE>::type near[8];
    if (left < 8) {
        std::memcpy(near, values, size_t(count(byte)) * sizeof *values);
        values = near;
    }
    const __m128i shuffle = _mm_load_si128((const __m128i*)shuffles.of[byte]);
    if constexpr (TYPE == FLOAT) {
        const __m256i places = _mm256_cvtepi16_epi32(shuffle);  // of a pair of bytes: place * 0x202 + 0x100, or negative
        const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), _mm256_srli_epi32(places, 1));
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), v);
    } else {
        const __m128i w = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), shuffle);
        if constexpr (TYPE == HALVES) return _mm256_cvtph_ps(w);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16));
    }
}

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits, int64_t left) {
    const int first = count(bits & 255);
    return {expand8<TYPE>(values, bits & 255, left), expand8<TYPE>(values + first, bits >> 8, left - first)};
}

#elif defined(SPARSIGHT_NEON)

struct Wide {
    float32x4_t part[4];
};

struct Lanes {
    float32x4_t part[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    void add(const Wide& w, const float* x) {
        for (int i = 0; i < 4; i++) part[i] = vfmaq_f32(part[i], w.part[i], vld1q_f32(x + 4 * i));
    }
    float total() const {
        float lanes[LANES];
        for (int i = 0; i < 4; i++) vst1q_f32(lanes + 4 * i, part[i]);
        return halves(lanes);
    }
};

template <int TYPE> inline void expand8(const typename Stored<TYPE>::type* values, uint32_t byte, int64_t left, float32x4_t* to) {
    typename Stored<TYPE>::type near[8] = {};
    if (left < 8) {
        std::memcpy(near, values, size_t(count(byte)) * sizeof *values);
        values = near;
    }
    if constexpr (TYPE == FLOAT) {  // two registers are a table of 32 bytes
        const uint8x16x2_t table = {{vld1q_u8((const uint8_t*)values), vld1q_u8((const uint8_t*)(values + 4))}};
        #pragma GCC unroll 8
        for (int half = 0; half < 2; half++) {
            uint8_t place[16];
            for (int i = 0; i < 16; i++) {
                const uint8_t two = shuffles.of[byte][8 * half + i / 4 * 2];
                place[i] = two & 0x80 ? 0x80 : uint8_t(2 * two + i % 4);
            }
            to[half] = vreinterpretq_f32_u8(vqtbl2q_u8(table, vld1q_u8(place)));
        }
    } else {
        const uint16x8_t w = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8((const uint8_t*)values), vld1q_u8(shuffles.of[byte])));
        if constexpr (TYPE == HALVES) {
            to[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(w)));
            to[1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(w)));
        } else {
            to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(w), 16));
            to[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(w), 16));
        }
    }
}

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits, int64_t left) {
    const int first = count(bits & 255);
    Wide wide;
    expand8<TYPE>(values, bits & 255, left, wide.part);
    expand8<TYPE>(values + first, bits >> 8, left - first, wide.part + 2);
    return wide;
}

#else

struct Wide {
    float lane[LANES];
};

struct Lanes {
    float lane[LANES] = {};
    void add(const Wide& w, const float* x) {
        for (int i = 0; i < LANES; i++) lane[i] = fused(w.lane[i], x[i], lane[i]);
    }
    float total() const { return halves(lane); }
};

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits, int64_t) {
    Wide wide;
    for (int i = 0; i < LANES; i++) wide.lane[i] = bits >> i & 1 ? Stored<TYPE>::wide(*values++) : 0.0f;
    return wide;
}

#endif

// `R` rows, each `apart` from the last, times `T` tokens; x is float32 (chunks, T, 16).
template <int TYPE, int R, int T>
void multiply(const Matrix& m, int64_t row, int64_t apart, const float* x, const Output<TYPE>& out, int64_t token) {
    using Value = typename Stored<TYPE>::type;
    const Value* const end = (const Value*)m.values + m.offset[m.rows];
    const Value* values[R];
    Lanes sum[R][T];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) values[r] = (const Value*)m.values + m.offset[row + r * apart];
    for (int64_t c = 0; c < m.columns; c += LANES) {
        const int64_t bytes = std::min<int64_t>(2, m.pitch() - c / 8);
        #pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const uint32_t bits = uint32_t(load_bits(m.bits + (row + r * apart) * m.pitch() + c / 8, bytes));
            if (c % 32 == 0) prefetch(values[r]);
            const auto w = expand16<TYPE>(values[r], bits, end - values[r]);
            #pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[r][t].add(w, x + c * T + t * LANES);
            values[r] += count(bits);
        }
    }
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) out.put(row + r * apart, token + t, sum[r][t].total());
}

#if defined(SPARSIGHT_AVX512)

// The same for bfloat16: x is bfloat16 (chunks, T, 32), products are added in pairs.
template <Kind KIND, int R, int T>
void multiply_pairs(const Matrix& m, int64_t row, int64_t apart, const uint16_t* x, const Output<BRAIN>& out, int64_t token) {
    const uint16_t* values[R];
    const uint8_t* bits[R];
    __m512 sum[R][T];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        values[r] = (const uint16_t*)m.values + (KIND == DENSE ? (row + r * apart) * m.columns : m.offset[row + r * apart]);
        bits[r] = m.bits + (row + r * apart) * m.pitch();
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    }
    const auto step = [&](int64_t c, int r, uint32_t mask, bool close) {
        const int kept = KIND == DENSE ? 32 : count(mask);
        __m512i w = close ? _mm512_maskz_loadu_epi16(KIND == DENSE ? mask : _bzhi_u32(~0u, unsigned(kept)), values[r])
                          : _mm512_loadu_si512(values[r]);
        if (KIND != DENSE) w = expand_words(mask, w);
        values[r] += kept;
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512i in = _mm512_load_si512(x + c * T + t * 32);
            sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)w, (__m512bh)in);
        }
    };
    int64_t c = 0;
    for (; c + 64 <= m.columns; c += 64) {
        #pragma GCC unroll 8
        for (int r = 0; r < R; r++) prefetch(values[r]);
        if (KIND == DENSE) for (int r = 0; r < R; r++) prefetch(values[r] + 32);
        #pragma GCC unroll 8
        for (int half = 0; half < 2; half++)
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                step(c + 32 * half, r, KIND == DENSE ? ~0u : load<uint32_t>(bits[r] + c / 8 + 4 * half), KIND == CLOSE);
    }
    for (; c < m.columns; c += 32) {
        const int64_t left = std::min<int64_t>(32, m.columns - c), bytes = (left + 7) / 8;
        #pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            step(c, r, KIND == DENSE ? _bzhi_u32(~0u, unsigned(left)) : uint32_t(load_bits(bits[r] + c / 8, bytes)), KIND != SPARSE);
    }
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) out.put(row + r * apart, token + t, Lanes{sum[r][t]}.total());
}

#endif

#if defined(SPARSIGHT_AVX512)
template <int T> struct Pairs {
    const Matrix& m;
    const uint16_t* x;
    const Output<BRAIN>& out;
    int64_t token;
    template <Kind KIND, int R> void run(int64_t row, int64_t apart) const { multiply_pairs<KIND, R, T>(m, row, apart, x, out, token); }
};

template <bool ALL> void product_pairs(const Matrix& m, const uint16_t* x, int64_t tokens, const Output<BRAIN>& out, int threads) {
    const int64_t padded = (m.columns + 31) / 32 * 32;
    const Lines<uint16_t> in(tokens * padded);
    walk_tokens(tokens, [&](int64_t token, auto count) {
        constexpr int T = count();
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            for (int64_t c = 0; c < m.columns; c += 32)
                std::memcpy(in.start + token * padded + c * T + t * 32, x + (token + t) * m.columns + c, size_t(std::min<int64_t>(32, m.columns - c)) * 2);
    });
    share(m.rows, m.columns, STREAMS, threads, [&](int64_t first, int64_t last) {
        walk_blocks(first, last, m.columns, tokens, [&](int64_t from, int64_t to) {
            walk_tokens(tokens, [&](int64_t token, auto count) {
                constexpr int T = count(), R = STREAMS;
                walk_rows<ALL, R, 32>(m, from, to, Pairs<T>{m, in.start + token * padded, out, token});
            });
        });
    });
}
#endif

template <int TYPE> void product(const Matrix& m, const void* x, int64_t tokens, const void* bias, void* out, int threads) {
    using Value = typename Stored<TYPE>::type;
    const Output<TYPE> output{(Value*)out, (const Value*)bias, m.rows};
#if defined(SPARSIGHT_AVX512)
    if constexpr (TYPE == BRAIN) return product_pairs<false>(m, (const Value*)x, tokens, output, threads);
#endif
    const int64_t padded = (m.columns + LANES - 1) / LANES * LANES;
    const Lines<float> in(tokens * padded);
    walk_tokens(tokens, [&](int64_t token, auto count) {
        constexpr int T = count();
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            for (int64_t c = 0; c < m.columns; c++)
                in.start[token * padded + c / LANES * LANES * T + t * LANES + c % LANES] = Stored<TYPE>::wide(((const Value*)x)[(token + t) * m.columns + c]);
    });
    share(m.rows, m.columns, STREAMS, threads, [&](int64_t first, int64_t last) {
        walk_blocks(first, last, m.columns, tokens, [&](int64_t from, int64_t to) {
            walk_tokens(tokens, [&](int64_t token, auto count) {
                constexpr int T = count(), R = STREAMS;
                const float* own = in.start + token * padded;
                const int64_t apart = (to - from) / R;
                for (int64_t row = from; row < from + apart; row++) multiply<TYPE, R, T>(m, row, apart, own, output, token);
                for (int64_t row = from + R * apart; row < to; row++) multiply<TYPE, 1, T>(m, row, 0, own, output, token);
            });
        });
    });
}

}  // namespace

// `out` (tokens, rows) = x (tokens, columns) W^T + bias (rows,) or none, all of one type. Without bits W is dense, which is
// for bfloat16 with AVX-512 only; returns 0 where there is nothing to run.
extern "C" int sparsight_product(const void* values, int type, const uint8_t* bits, const int64_t* offset, int64_t rows,
                                 int64_t columns, const void* x, int64_t tokens, const void* bias, void* out, int threads) {
    const Matrix m{values, bits, offset, rows, columns};
    if (!bits) {
#if defined(SPARSIGHT_AVX512)
        if (type != BRAIN) return 0;
        product_pairs<true>(m, (const uint16_t*)x, tokens, {(uint16_t*)out, (const uint16_t*)bias, rows}, threads);
        return 1;
#else
        return 0;
#endif
    }
    const auto run = type == FLOAT ? product<FLOAT> : type == BRAIN ? product<BRAIN> : product<HALVES>;
    run(m, x, tokens, bias, out, threads);
    return 1;
}
