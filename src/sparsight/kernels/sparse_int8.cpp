// Products with packed int8 weights. Inputs are rounded to int8 with a scale per token and block of columns.
//
// Sums are exact integers per block, column c in lane c / 4 % 16, then sixteen lanes of float32: the same bits on every CPU
// that has fused multiply-adds.

#include "packed.h"

namespace {

constexpr int64_t BLOCK = 256;  // columns that share a scale of the input

// Inputs in int8, with a scale per block of columns; `shift`: -128 times the sum of a lane, since weights are multiplied as
// unsigned q + 128, and a pruned one as 128.
struct Codes {
    int64_t padded, blocks;
    Lines<int8_t> code;           // per group of T tokens: (chunks, T, 64)
    std::vector<float> scale;     // (tokens, blocks)
    std::vector<int32_t> shift;   // (tokens, blocks, LANES)

    template <int TYPE> Codes(const typename Stored<TYPE>::type* x, int64_t tokens, int64_t columns, Stored<TYPE>)
        : padded((columns + BLOCK - 1) / BLOCK * BLOCK), blocks(padded / BLOCK), code(tokens * padded),
          scale(size_t(tokens * blocks)), shift(size_t(tokens * blocks * LANES)) {
        walk_tokens(tokens, [&](int64_t first, auto count) {
            constexpr int T = count();
            for (int64_t i = 0; i < T * blocks; i++) {
                const int64_t t = i / blocks, token = first + t, from = i % blocks * BLOCK, place = token * blocks + i % blocks;
                const int64_t known = std::min(BLOCK, columns - from);
                float wide[BLOCK] = {};
                uint32_t most = 0;  // of absolute values, which count in the order of their bits
                for (int64_t c = 0; c < known; c++) wide[c] = Stored<TYPE>::wide(x[token * columns + from + c]);
                for (int64_t c = 0; c < BLOCK; c++) most = std::max(most, as_bits(wide[c]) & 0x7fffffff);
                const bool finite = most < 0x7f800000;  // else the whole block gives NaN, and not zeros
                const float inverse = finite && most ? 127 / as_float(most) : 0;
                scale[size_t(place)] = finite ? as_float(most) / 127 : NAN;
                int32_t* const sums = &shift[size_t(place * LANES)];
                int8_t* const to = code.start + first * padded + from * T + t * 64;
                for (int64_t chunk = 0; chunk < BLOCK; chunk += 64)
                    for (int64_t c = 0; c < 64; c++) {
                        const int8_t value = int8_t(round(finite ? wide[chunk + c] : 0, inverse));
                        to[chunk * T + c] = value;
                        sums[c / 4] -= 128 * value;
                    }
            }
        });
    }

    static int32_t round(float a, float b) {  // a * b to nearest even, for less than 2^22: the sum's last bit is worth one
        return int32_t(as_bits(fused(a, b, 0x1.8p23f))) - 0x4b400000;
    }
};

#if !defined(SPARSIGHT_AVX512)

// The exact sums of a block's sixteen lanes; 64 inputs lie together, and then the next 64 are `APART` on.
template <int64_t APART> inline void sum_lanes(const int8_t* w, const int8_t* x, int32_t* sums) {
#if defined(SPARSIGHT_AVX2)
    const auto words = [](const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); };
    __m256i pairs[4] = {};
    #pragma GCC unroll 4
    for (int64_t chunk = 0; chunk < BLOCK / 64; chunk++)
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256i products = _mm256_madd_epi16(words(w + 64 * chunk + 16 * i), words(x + APART * chunk + 16 * i));
            pairs[i] = _mm256_add_epi32(pairs[i], products);
        }
    for (int half = 0; half < 2; half++) {
        const __m256i fours = _mm256_hadd_epi32(pairs[2 * half], pairs[2 * half + 1]);
        _mm256_storeu_si256((__m256i*)(sums + 8 * half), _mm256_permute4x64_epi64(fours, 0xd8));
    }
#elif defined(SPARSIGHT_NEON) && defined(__ARM_FEATURE_DOTPROD)
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int32x4_t fours = vdupq_n_s32(0);
        #pragma GCC unroll 4
        for (int64_t chunk = 0; chunk < BLOCK / 64; chunk++)
            fours = vdotq_s32(fours, vld1q_s8(w + 64 * chunk + 16 * i), vld1q_s8(x + APART * chunk + 16 * i));
        vst1q_s32(sums + 4 * i, fours);
    }
#else
    for (int lane = 0; lane < LANES; lane++) {
        sums[lane] = 0;
        for (int64_t chunk = 0; chunk < BLOCK / 64; chunk++)
            for (int c = 4 * lane; c < 4 * lane + 4; c++) sums[lane] += int32_t(w[64 * chunk + c]) * x[APART * chunk + c];
    }
#endif
}

#endif

// The sums of all rows and tokens (tokens, rows), without the rows' scales: products of int8 are the same for every type.
struct Totals {
    std::vector<float> sum;
    int64_t rows;
    Totals(int64_t tokens, int64_t rows) : sum(size_t(tokens * rows)), rows(rows) {}
    float& at(int64_t row, int64_t token) { return sum[size_t(token * rows + row)]; }
};

// `R` rows of int8 values times `T` tokens.
template <Kind KIND, int R, int T>
void multiply_codes(const Matrix& m, int64_t row, int64_t apart, const Codes& in, int64_t token, Totals& totals) {
    const int8_t* values[R];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) values[r] = (const int8_t*)m.values + (KIND == DENSE ? (row + r * apart) * m.columns : m.offset[row + r * apart]);
#if defined(SPARSIGHT_AVX512)
    const uint8_t* bits[R];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++) bits[r] = m.bits + (row + r * apart) * m.pitch();
    const __m512i flip = _mm512_set1_epi8(char(-128));
    __m512 sum[R][T];
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < in.blocks; block++) {
        __m512i part[R][T];
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++) part[r][t] = _mm512_loadu_si512(&in.shift[size_t(((token + t) * in.blocks + block) * LANES)]);
        const auto step = [&](int64_t c, bool whole) {
            __m512i x[T];
            #pragma GCC unroll 8
            for (int t = 0; t < T; t++) x[t] = _mm512_load_si512(in.code.start + token * in.padded + c * T + t * 64);
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                uint64_t mask = ~uint64_t(0);
                if (KIND != DENSE) mask = whole ? load<uint64_t>(bits[r] + c / 8) : load_bits(bits[r] + c / 8, m.pitch() - c / 8);
                else if (!whole) mask = _bzhi_u64(mask, unsigned(m.columns - c));
                const int kept = KIND == DENSE ? 64 : count(mask);
                __m512i w = KIND == CLOSE || (KIND == DENSE && !whole)
                                ? _mm512_maskz_loadu_epi8(KIND == DENSE ? mask : _bzhi_u64(~uint64_t(0), unsigned(kept)), values[r])
                                : _mm512_loadu_si512(values[r]);
                if (KIND != DENSE) w = expand_bytes(mask, w);
                w = _mm512_xor_si512(w, flip);
                values[r] += kept;
                #pragma GCC unroll 8
                for (int t = 0; t < T; t++) part[r][t] = _mm512_dpbusd_epi32(part[r][t], w, x[t]);
            }
        };
        const int64_t from = block * BLOCK;
        if (from + BLOCK <= m.columns) {
            for (int64_t c = from; c < from + BLOCK; c += 128) {
                #pragma GCC unroll 8
                for (int r = 0; r < R; r++) prefetch(values[r]);
                if (KIND == DENSE) for (int r = 0; r < R; r++) prefetch(values[r] + 64);
                step(c, true);
                step(c + 64, true);
            }
        } else {
            for (int64_t c = from; c < m.columns; c += 64) step(c, c + 64 <= m.columns);
        }
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512 scale = _mm512_set1_ps(in.scale[size_t((token + t) * in.blocks + block)]);
            #pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r][t]), scale, sum[r][t]);
        }
    }
    #pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        #pragma GCC unroll 8
        for (int t = 0; t < T; t++) totals.at(row + r * apart, token + t) = halves(sum[r][t]);
#else
    static thread_local std::vector<int8_t> dense;
    dense.assign(size_t(in.padded), 0);
    for (int r = 0; r < R; r++) {
        float lanes[T][LANES] = {};
        if (KIND == DENSE) std::memcpy(dense.data(), values[r], size_t(m.columns));
        else expand_rows<uint8_t>(m, row + r * apart, row + r * apart + 1, (uint8_t*)dense.data());
        for (int64_t block = 0; block < in.blocks; block++)
            #pragma GCC unroll 1
            for (int t = 0; t < T; t++) {
                int32_t part[LANES];
                sum_lanes<T * 64>(&dense[size_t(block * BLOCK)], in.code.start + token * in.padded + block * BLOCK * T + t * 64, part);
                const float scale = in.scale[size_t((token + t) * in.blocks + block)];
                for (int lane = 0; lane < LANES; lane++) lanes[t][lane] = fused(float(part[lane]), scale, lanes[t][lane]);
            }
        #pragma GCC unroll 1
        for (int t = 0; t < T; t++) totals.at(row + r * apart, token + t) = halves(lanes[t]);
    }
#endif
}

template <int T> struct Coded {
    const Matrix& m;
    const Codes& in;
    int64_t token;
    Totals& totals;
    template <Kind KIND, int R> void run(int64_t row, int64_t apart) const { multiply_codes<KIND, R, T>(m, row, apart, in, token, totals); }
};

template <bool ALL> void multiply_all(const Matrix& m, const Codes& in, int64_t tokens, Totals& totals, int threads) {
    share(m.rows, m.columns, STREAMS, threads, [&](int64_t first, int64_t last) {
        walk_blocks(first, last, m.columns, tokens, [&](int64_t from, int64_t to) {
            walk_tokens(tokens, [&](int64_t token, auto count) {
                constexpr int T = count(), R = T == MOST ? STREAMS / 2 : STREAMS;
                walk_rows<ALL, R, 64>(m, from, to, Coded<T>{m, in, token, totals});
            });
        });
    });
}

template <int TYPE>
void product_codes(const Matrix& m, const float* scale, const void* x, int64_t tokens, const void* bias, void* out, int threads) {
    using Value = typename Stored<TYPE>::type;
    const Output<TYPE> output{(Value*)out, (const Value*)bias, m.rows};
    const Codes in((const Value*)x, tokens, m.columns, Stored<TYPE>());
    Totals totals(tokens, m.rows);
    (m.bits ? multiply_all<false> : multiply_all<true>)(m, in, tokens, totals, threads);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t row = 0; row < m.rows; row++) output.put(row, token, totals.at(row, token), scale[row]);
}

}  // namespace

// The same for int8 values with a scale per row (rows,); `type` is that of x, bias and out. Without bits W is dense.
extern "C" int sparsight_product_int8(const void* values, const float* scale, int type, const uint8_t* bits,
                                      const int64_t* offset, int64_t rows, int64_t columns, const void* x, int64_t tokens,
                                      const void* bias, void* out, int threads) {
    const Matrix m{values, bits, offset, rows, columns};
    const auto run = type == FLOAT ? product_codes<FLOAT> : type == BRAIN ? product_codes<BRAIN> : product_codes<HALVES>;
    run(m, scale, x, tokens, bias, out, threads);
    return 1;
}
