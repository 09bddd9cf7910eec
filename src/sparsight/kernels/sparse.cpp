// Products with packed weights in float32, bfloat16 and float16. Inputs are copied once, padded with
// zeros to whole steps, and in the order in which they are read: (chunks, T, columns of a chunk) for each group of T tokens.
//
// Sums of float32, float16 and, without AVX-512, bfloat16: sixteen lanes, column c in lane c % 16, fused multiply-adds, lanes
// added in halves: the same bits on every CPU that has fused multiply-adds. AVX-512 adds bfloat16 in pairs.

#include "packed.h"

namespace {

// Sixteen columns of a row in float32, and their products, lane by lane, in the sum of a row and a token. `expand16` may read
// sixteen values, however few are kept. `place` says in which lane of the registers a column lies.

#if defined(SPARSIGHT_AVX512)

using Wide = __m512;

template <int TYPE> struct Lanes {
    __m512 sum = _mm512_setzero_ps();
    static int place(int column) { return column; }
    void add(Wide w, const float* x) { sum = _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum); }
    float total() const { return halves(sum); }
};

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits) {
    if constexpr (TYPE == FLOAT) {
        return _mm512_castsi512_ps(expand_longs(__mmask16(bits), _mm512_loadu_si512(values)));
    } else {
        const __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
        const __m256i w = _mm512_castsi512_si256(expand_words(bits, v));
        if constexpr (TYPE == HALVES) return _mm512_cvtph_ps(w);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
    }
}

#elif defined(SPARSIGHT_AVX2)

struct Wide {
    __m256 low, high;
};

template <int TYPE> struct Lanes {
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    static int place(int column) { return TYPE == BRAIN ? column / 2 + column % 2 * 8 : column; }
    void add(const Wide& w, const float* x) {
        low = _mm256_fmadd_ps(w.low, _mm256_loadu_ps(x), low);
        high = _mm256_fmadd_ps(w.high, _mm256_loadu_ps(x + 8), high);
    }
    float total() const {
        alignas(32) float lanes[LANES];
        float columns[LANES];
        _mm256_store_ps(lanes, low);
        _mm256_store_ps(lanes + 8, high);
        for (int i = 0; i < LANES; i++) columns[i] = lanes[place(i)];
        return halves(columns);
    }
};

inline __m128i shuffle8(const uint16_t* values, uint32_t byte) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_load_si128((const __m128i*)shuffles.of[byte]));
}

inline __m256 expand8(const float* values, uint32_t byte) {
    const __m128i shuffle = _mm_load_si128((const __m128i*)shuffles.of[byte]);
    const __m256i places = _mm256_cvtepi16_epi32(shuffle);  // of a pair of bytes: place * 0x202 + 0x100, or negative
    const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), _mm256_srli_epi32(places, 1));
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), v);
}

inline Wide of_brains(__m256i w) {  // even columns, odd columns: a shift and a mask each, and no way between the lanes
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int32_t(0xffff0000))))};
}

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits) {
    const uint32_t first = bits & 255, second = bits >> 8;
    const auto* rest = values + count(first);
    if constexpr (TYPE == FLOAT) return {expand8(values, first), expand8(rest, second)};
    else if constexpr (TYPE == HALVES) return {_mm256_cvtph_ps(shuffle8(values, first)), _mm256_cvtph_ps(shuffle8(rest, second))};
    else return of_brains(_mm256_set_m128i(shuffle8(rest, second), shuffle8(values, first)));
}

inline Wide widen16(const uint16_t* values) { return of_brains(_mm256_loadu_si256((const __m256i*)values)); }

#elif defined(SPARSIGHT_NEON)

struct Wide {
    float32x4_t part[4];
};

template <int TYPE> struct Lanes {
    float32x4_t part[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    static int place(int column) { return column; }
    void add(const Wide& w, const float* x) {
        for (int i = 0; i < 4; i++) part[i] = vfmaq_f32(part[i], w.part[i], vld1q_f32(x + 4 * i));
    }
    float total() const {
        float lanes[LANES];
        for (int i = 0; i < 4; i++) vst1q_f32(lanes + 4 * i, part[i]);
        return halves(lanes);
    }
};

inline void widen8(uint16x8_t w, float32x4_t* to) {
    to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(w), 16));
    to[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(w), 16));
}

template <int TYPE> inline void expand8(const typename Stored<TYPE>::type* values, uint32_t byte, float32x4_t* to) {
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
            widen8(w, to);
        }
    }
}

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits) {
    Wide wide;
    expand8<TYPE>(values, bits & 255, wide.part);
    expand8<TYPE>(values + count(bits & 255), bits >> 8, wide.part + 2);
    return wide;
}

inline Wide widen16(const uint16_t* values) {
    Wide wide;
    widen8(vld1q_u16(values), wide.part);
    widen8(vld1q_u16(values + 8), wide.part + 2);
    return wide;
}

#else

struct Wide {
    float lane[LANES];
};

template <int TYPE> struct Lanes {
    float lane[LANES] = {};
    static int place(int column) { return column; }
    void add(const Wide& w, const float* x) {
        for (int i = 0; i < LANES; i++) lane[i] = fused(w.lane[i], x[i], lane[i]);
    }
    float total() const { return halves(lane); }
};

template <int TYPE> inline Wide expand16(const typename Stored<TYPE>::type* values, uint32_t bits) {
    Wide wide;
    for (int i = 0; i < LANES; i++) wide.lane[i] = bits >> i & 1 ? Stored<TYPE>::wide(*values++) : 0.0f;
    return wide;
}

inline Wide widen16(const uint16_t* values) {
    Wide wide;
    for (int i = 0; i < LANES; i++) wide.lane[i] = of_brain(values[i]);
    return wide;
}

#endif

// `R` rows, each `apart` from the last, times `T` tokens; x is float32 (chunks, T, 16). One token: all rows at once, so that
// they share what is read of x. More: one row after the other for as many columns as stay in the first cache.
template <int TYPE, Kind KIND, int R, int T>
void multiply(const Matrix& m, int64_t row, int64_t apart, const float* x, const Output<TYPE>& out, int64_t token) {
    using Value = typename Stored<TYPE>::type;
    constexpr int64_t STEP = 4 * LANES, BLOCK = T == 1 ? STEP : 8 * STEP;
    const Value* values[R];
    const uint8_t* bits[R];
    Lanes<TYPE> sums[R][T];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        values[r] = (const Value*)m.values + (KIND == DENSE ? (row + r * apart) * m.columns : m.offset[row + r * apart]);
        bits[r] = m.bits + (row + r * apart) * m.pitch();
    }
    std::vector<Value> near;  // the last values, with room behind them
    if (KIND == CLOSE) {
        near.assign(values[0], (const Value*)m.values + m.offset[row + 1]);
        near.resize(near.size() + LANES);
        values[0] = near.data();
    }
    const auto add = [&](Lanes<TYPE>* sum, const Wide& w, int64_t c) {
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t].add(w, x + c * T + t * LANES);
    };
    const auto step = [&](Lanes<TYPE>* sum, const Value*& next, uint32_t mask, int64_t c) {
        if constexpr (KIND == DENSE) {
            add(sum, widen16(next), c);
            next += LANES;
        } else {
            add(sum, expand16<TYPE>(next, mask), c);
            next += count(mask);
        }
    };
    const int64_t whole = m.columns / LANES * LANES, left = m.columns - whole;
    const auto walk = [&](int r, int64_t from, int64_t to) {
        Lanes<TYPE> sum[T];
        const Value* next = values[r];
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t] = sums[r][t];
        int64_t c = from;
        for (; c + STEP <= to; c += STEP) {
            uint64_t mask = 0;
            if constexpr (KIND != DENSE) mask = load<uint64_t>(bits[r] + c / 8);
            for (int64_t i = 0; i < STEP * int64_t(sizeof(Value)); i += 64 << (KIND != DENSE)) prefetch((const char*)next + i);
            #pragma GCC unroll 8
            for (int i = 0; i < STEP; i += LANES) step(sum, next, uint32_t(mask >> i & 0xffff), c + i);
        }
        for (; c < to; c += LANES) step(sum, next, KIND == DENSE ? 0 : load<uint16_t>(bits[r] + c / 8), c);
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[r][t] = sum[t];
        values[r] = next;
    };
    for (int64_t from = 0; from < whole; from += BLOCK) {
        const int64_t to = std::min(whole, from + BLOCK);
        if constexpr (T == 1)
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++) walk(r, from, to);
        else
            #pragma GCC unroll 1
            for (int r = 0; r < R; r++) walk(r, from, to);
    }
    if (left)
        #pragma GCC unroll 1
        for (int r = 0; r < R; r++) {
            if constexpr (KIND == DENSE) {
                Value last[LANES] = {};
                std::memcpy(last, values[r], size_t(left) * sizeof(Value));
                add(sums[r], widen16(last), whole);
            } else {
                add(sums[r], expand16<TYPE>(values[r], uint32_t(load_bits(bits[r] + whole / 8, (left + 7) / 8))), whole);
            }
        }
    #pragma GCC unroll 1
    for (int r = 0; r < R; r++)
        #pragma GCC unroll 1
        for (int t = 0; t < T; t++) out.put(row + r * apart, token + t, sums[r][t].total());
}

template <int TYPE, int T> struct Group {
    const Matrix& m;
    const float* x;
    const Output<TYPE>& out;
    int64_t token;
    template <Kind KIND, int R> void run(int64_t row, int64_t apart) const { multiply<TYPE, KIND, R, T>(m, row, apart, x, out, token); }
};

#if defined(SPARSIGHT_AVX512)

// The same for bfloat16, 32 columns at a time. AMD adds pairs of products in one instruction, and x is bfloat16; on Intel that
// takes longer than to add even and odd columns apart, and x is float32, sixteen even columns before sixteen odd ones.
#if defined(__AMX_BF16__)
using Input = float;
inline Input input(uint16_t value) { return of_brain(value); }
inline int place(int column) { return column % 2 * 16 + column / 2; }
inline __m512 add_pairs(__m512i w, const float* x, __m512 sum) {
    const __m512i odd = _mm512_and_si512(w, _mm512_set1_epi32(int32_t(0xffff0000)));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_load_ps(x), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(odd), _mm512_load_ps(x + 16), sum);
}
#else
using Input = uint16_t;
inline Input input(uint16_t value) { return value; }
inline int place(int column) { return column; }
inline __m512 add_pairs(__m512i w, const uint16_t* x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_load_si512(x));
}
#endif

template <Kind KIND, int R, int T>
void multiply_pairs(const Matrix& m, int64_t row, int64_t apart, const Input* x, const Output<BRAIN>& out, int64_t token) {
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
        for (int t = 0; t < T; t++) sum[r][t] = add_pairs(w, x + c * T + t * 32, sum[r][t]);
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
        for (int t = 0; t < T; t++) out.put(row + r * apart, token + t, halves(sum[r][t]));
}

#endif

#if defined(SPARSIGHT_AVX512)
template <int T> struct Pairs {
    const Matrix& m;
    const Input* x;
    const Output<BRAIN>& out;
    int64_t token;
    template <Kind KIND, int R> void run(int64_t row, int64_t apart) const { multiply_pairs<KIND, R, T>(m, row, apart, x, out, token); }
};

template <bool ALL> void product_pairs(const Matrix& m, const void* inputs, int64_t tokens, const void* bias, void* output, int threads) {
    const auto* const x = (const uint16_t*)inputs;
    const Output<BRAIN> out{(uint16_t*)output, (const uint16_t*)bias, m.rows};
    const int64_t padded = (m.columns + 31) / 32 * 32;
    const Lines<Input> in(tokens * padded);
    walk_tokens(tokens, [&](int64_t token, auto count) {
        constexpr int T = count();
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const uint16_t* const from = x + (token + t) * m.columns;
            Input* const to = in.start + token * padded + t * 32;
            for (int64_t c = 0; c < m.columns; c += 32)
                for (int i = 0; i < std::min<int64_t>(32, m.columns - c); i++) to[c * T + place(i)] = input(from[c + i]);
        }
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

template <int TYPE, bool ALL> void product(const Matrix& m, const void* x, int64_t tokens, const void* bias, void* out, int threads) {
    using Value = typename Stored<TYPE>::type;
    const Output<TYPE> output{(Value*)out, (const Value*)bias, m.rows};
    const int64_t padded = (m.columns + LANES - 1) / LANES * LANES;
    const Lines<float> in(tokens * padded);
    walk_tokens(tokens, [&](int64_t token, auto count) {
        constexpr int T = count();
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const Value* from = (const Value*)x + (token + t) * m.columns;
            float* to = in.start + token * padded + t * LANES;
            for (int64_t c = 0; c < m.columns; c++)
                to[c / LANES * LANES * T + Lanes<TYPE>::place(int(c % LANES))] = Stored<TYPE>::wide(from[c]);
        }
    });
    share(m.rows, m.columns, STREAMS, threads, [&](int64_t first, int64_t last) {
        walk_blocks(first, last, m.columns, tokens, [&](int64_t from, int64_t to) {
            walk_tokens(tokens, [&](int64_t token, auto count) {
                constexpr int T = count(), R = STREAMS;
                walk_rows<ALL, R, LANES>(m, from, to, Group<TYPE, T>{m, in.start + token * padded, output, token});
            });
        });
    });
}

}  // namespace

// `out` (tokens, rows) = x (tokens, columns) W^T + bias (rows,) or none, all of one type. Without bits W is dense, which is
// for bfloat16 only; returns 0 where there is nothing to run.
extern "C" int sparsight_product(const void* values, int type, const uint8_t* bits, const int64_t* offset, int64_t rows,
                                 int64_t columns, const void* x, int64_t tokens, const void* bias, void* out, int threads) {
    if (!bits && type != BRAIN) return 0;
    const Matrix m{values, bits, offset, rows, columns};
#if defined(SPARSIGHT_AVX512)
    const auto brain = bits ? product_pairs<false> : product_pairs<true>;
#else
    const auto brain = bits ? product<BRAIN, false> : product<BRAIN, true>;
#endif
    const auto run = type == FLOAT ? product<FLOAT, false> : type == BRAIN ? brain : product<HALVES, false>;
    run(m, x, tokens, bias, out, threads);
    return 1;
}
