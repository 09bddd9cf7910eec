// The masked low-rank products of SparseLoRA, with the mask in bits: no intermediate of the weight's size.
//
// Merging holds a tile of B A in registers over all ranks and meets W and the mask only at the end. The gradients' inputs
// are widened and masked once into a tile in L1, from which both products are taken: into dB along rows, summed over lanes
// at the end of a tile, and into dA along columns. Ranks are padded with zeros to whole registers.
//
// GCC vector extensions, which any CPU compiles; a few small functions have a form of their own for AVX-512.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "threads.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ACROSS = 4;  // floats of a vector; vectors side by side in registers
#elif defined(__AVX__)
constexpr int LANES = 8, ACROSS = 2;
#else
constexpr int LANES = 4, ACROSS = 2;
#endif
constexpr int HIGH = 4;               // rows held in registers
constexpr int WIDE = ACROSS * LANES;  // columns held in registers
constexpr int ROWS = 16, TILE = 256;  // rows and columns whose gradient stays in L1
constexpr int64_t SHARE = 1 << 19;    // weights that pay for a thread
constexpr int64_t WALK = 1 << 12;     // flat entries a thread takes at least

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

struct Brain { uint16_t bits; };  // bfloat16
struct Half { uint16_t bits; };   // float16

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const float* p) { return load<vec>(p); }

struct Free { void operator()(float* p) const { std::free(p); } };
using Floats = std::unique_ptr<float[], Free>;
Floats zeros(size_t count) {
    const size_t bytes = (count * 4 + 64) / 64 * 64;
    return Floats((float*)std::memset(std::aligned_alloc(64, bytes), 0, bytes));
}

#ifdef __AVX512F__  // as below, which GCC takes apart
inline uvec widen(hvec v) { return (uvec)_mm512_cvtepu16_epi32((__m256i)v); }
inline hvec narrow(uvec v) { return (hvec)_mm512_cvtepi32_epi16((__m512i)v); }
#else
inline uvec widen(hvec v) { return __builtin_convertvector(v, uvec); }
inline hvec narrow(uvec v) { return __builtin_convertvector(v, hvec); }
#endif
inline vec widen(vec v, const float*) { return v; }
inline vec widen(hvec v, const Brain*) { return (vec)(widen(v) << 16); }
inline void narrow(vec v, float* p) { store(p, v); }
inline void narrow(vec v, Brain* p) {  // to nearest, ties to even
    const uvec bits = (uvec)v, even = (bits >> 16) & 1;
    store(p, narrow((v == v ? bits + 0x7fff + even : bits | 0x400000) >> 16));
}

#if defined(__AVX512F__)
inline vec widen(hvec v, const Half*) { return (vec)_mm512_cvtph_ps((__m256i)v); }
inline void narrow(vec v, Half* p) { store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__FLT16_MAX__)
inline vec widen(hvec v, const Half*) {
    _Float16 from[LANES];
    vec to;
    std::memcpy(from, &v, sizeof from);
    for (int l = 0; l < LANES; l++) to[l] = from[l];
    return to;
}
inline void narrow(vec v, Half* p) {
    _Float16 to[LANES];
    for (int l = 0; l < LANES; l++) to[l] = (_Float16)v[l];
    std::memcpy(p, to, sizeof to);
}
#endif
#if defined(__AVX512F__) || defined(__FLT16_MAX__)
constexpr bool HALF = true;
#else
constexpr bool HALF = false;
inline vec widen(hvec, const Half*) { return vec{}; }
inline void narrow(vec, Half*) {}
#endif

// A vector of floats from the next `count` entries, zero beyond them.
template <class T> inline vec read(const T* p, int64_t count) {
    using V = std::conditional_t<std::is_same_v<T, float>, vec, hvec>;
    if (count >= LANES) return widen(load<V>(p), p);
    V part = {};
    if (count > 0) std::memcpy(&part, p, count * sizeof(T));
    return widen(part, p);
}
template <class T> inline void write(vec v, T* p, int64_t count) {
    if (count >= LANES) return narrow(v, p);
    T part[LANES];
    narrow(v, part);
    if (count > 0) std::memcpy(p, part, count * sizeof(T));
}

struct Mask {
    const uint8_t* bits;  // null: nothing is masked
    int64_t bytes;
    // The bits from one place on, at least 24 of them.
    uint32_t at(int64_t place) const {
        uint32_t word = 0;
        const int64_t byte = place / 8;
        if (byte + 4 <= bytes) std::memcpy(&word, bits + byte, 4);
        else if (byte < bytes) std::memcpy(&word, bits + byte, bytes - byte);
        return word >> place % 8;
    }
    // +0 where the bit is 0, whatever stood there.
    vec operator()(vec v, int64_t place) const {
        if (!bits) return v;
#ifdef __AVX512F__
        return (vec)_mm512_maskz_mov_ps((__mmask16)at(place), (__m512)v);
#else
        uvec lane;
        for (int l = 0; l < LANES; l++) lane[l] = 1u << l;
        return (vec)((ivec)v & (((uvec{} + at(place)) & lane) != 0));
#endif
    }
};

// The sums over lanes of HIGH * ACROSS vectors.
inline void sum_lanes(const vec* v, float* out) {
#ifdef __AVX512F__
    static_assert(HIGH * ACROSS == LANES);
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec s[LANES];
    std::memcpy(s, v, sizeof s);
#pragma GCC unroll 4
    for (int k = LANES / 2; k > 0; k /= 2) {
        const ivec high = (lane & k) != 0, own = lane + (high & LANES), other = (lane ^ k) + (high & LANES);
#pragma GCC unroll 8
        for (int i = 0; i < k; i++) {
            const __m512 a = (__m512)s[i], b = (__m512)s[i + k];
            s[i] = (vec)_mm512_permutex2var_ps(a, (__m512i)own, b) + (vec)_mm512_permutex2var_ps(a, (__m512i)other, b);
        }
    }
    store(out, s[0]);
#else
    for (int i = 0; i < HIGH * ACROSS; i++) {
        out[i] = 0;
        for (int l = 0; l < LANES; l++) out[i] += v[i][l];
    }
#endif
}

// Run `work(first, last, thread)` on equal parts of `rows`, in whole blocks of ROWS; returns how many parts there were.
template <class Work> int share(int64_t rows, int64_t columns, int threads, const Work& work) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    const int parts = int(std::max<int64_t>(1, std::min<int64_t>({threads, blocks, rows * columns / SHARE})));
    const auto begin = [&](int i) { return std::min(rows, blocks * i / parts * ROWS); };
    const auto part = [&](int i) { work(begin(i), begin(i + 1), i); };
    in_parts(parts, part);
    return parts;
}

struct Merge {
    const void* W; int64_t rows, columns, ld;
    const float *A, *B; int64_t rank; float scaling;  // A packed: [panel of WIDE columns][rank][WIDE]
    Mask mask;
    void* E;
};

template <class T, bool TIMES> void merge_rows(const Merge& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += HIGH) {
        const T* W[HIGH];
        const float* B[HIGH];
        int64_t at[HIGH];
        for (int i = 0; i < HIGH; i++) {  // rows beyond the last are the last once more
            at[i] = std::min(row + i, last - 1);
            W[i] = (const T*)job.W + at[i] * job.ld, B[i] = job.B + at[i] * job.rank;
            at[i] *= job.columns;
        }
        const float* A = job.A;
        for (int64_t j = 0; j < job.columns; j += WIDE) {
            vec sum[HIGH][ACROSS] = {};
            for (int64_t k = 0; k < job.rank; k++, A += WIDE) {
                vec a[ACROSS];
                for (int v = 0; v < ACROSS; v++) a[v] = load(A + v * LANES);
                for (int i = 0; i < HIGH; i++)
                    for (int v = 0; v < ACROSS; v++) sum[i][v] += B[i][k] * a[v];
            }
            for (int i = 0; i < HIGH; i++)
                for (int v = 0; v < ACROSS; v++) {
                    const int64_t c = j + v * LANES;
                    const vec w = read(W[i] + c, job.columns - c), change = job.scaling * sum[i][v];
                    write(job.mask(TIMES ? w * (1 + change) : w + change, at[i] + c), (T*)job.E + at[i] + c, job.columns - c);
                }
        }
    }
}

struct Project {
    const void *dE, *W; int64_t rows, columns, ld, ldw;  // W null: no factor
    const float *A, *B; int64_t rank, padded;  // A (rank, columns); B (rows and some, padded)
    Mask mask;
    float* dB;  // as B
};

template <class T> void project_rows(const Project& job, int64_t first, int64_t last, float* dA) {
    const int64_t columns = job.columns, padded = job.padded;
    const Floats buffer = zeros((2 * padded + ROWS) * TILE);
    float *const a = buffer.get(), *const da = a + padded * TILE, *const d = da + padded * TILE;
    for (int64_t j = 0; j < columns; j += TILE) {
        const int64_t width = std::min<int64_t>(TILE, columns - j), across = (width + WIDE - 1) / WIDE * WIDE;
        std::memset(a, 0, 2 * padded * TILE * sizeof(float));
        for (int64_t k = 0; k < job.rank; k++) std::memcpy(a + k * TILE, job.A + k * columns + j, width * sizeof(float));
        for (int64_t row = first; row < last; row += ROWS) {
            const int64_t count = std::min<int64_t>(ROWS, last - row);
            for (int64_t o = 0; o < ROWS; o++) {
                if (o >= count) { std::memset(d + o * TILE, 0, TILE * sizeof(float)); continue; }
                const T* from = (const T*)job.dE + (row + o) * job.ld + j;
                const T* factor = job.W ? (const T*)job.W + (row + o) * job.ldw + j : nullptr;
                for (int64_t c = 0; c < across; c += LANES) {
                    if (row + o + ROWS < last) __builtin_prefetch(from + ROWS * job.ld + c);
                    vec v = read(from + c, width - c);
                    if (factor) v *= read(factor + c, width - c);
                    store(d + o * TILE + c, job.mask(v, (row + o) * columns + j + c));
                }
            }
            for (int64_t o = 0; o < ROWS; o += HIGH)
                for (int64_t k = 0; k < padded; k += ACROSS) {
                    vec sum[HIGH * ACROSS] = {};
                    for (int64_t c = 0; c < across; c += LANES) {
                        vec some[ACROSS];
                        for (int v = 0; v < ACROSS; v++) some[v] = load(a + (k + v) * TILE + c);
                        for (int i = 0; i < HIGH; i++) {
                            const vec own = load(d + (o + i) * TILE + c);
                            for (int v = 0; v < ACROSS; v++) sum[i * ACROSS + v] += own * some[v];
                        }
                    }
                    float sums[HIGH * ACROSS], *to = job.dB + (row + o) * padded + k;
                    sum_lanes(sum, sums);
                    for (int i = 0; i < HIGH; i++)
                        for (int v = 0; v < ACROSS; v++) to[i * padded + v] += sums[i * ACROSS + v];
                }
            for (int64_t c = 0; c < across; c += WIDE)
                for (int64_t k = 0; k < padded; k += HIGH) {
                    vec sum[HIGH][ACROSS];
                    for (int i = 0; i < HIGH; i++)
                        for (int v = 0; v < ACROSS; v++) sum[i][v] = load(da + (k + i) * TILE + c + v * LANES);
                    const float* b = job.B + row * padded + k;
                    for (int64_t o = 0; o < ROWS; o++, b += padded) {
                        vec own[ACROSS];
                        for (int v = 0; v < ACROSS; v++) own[v] = load(d + o * TILE + c + v * LANES);
                        for (int i = 0; i < HIGH; i++)
                            for (int v = 0; v < ACROSS; v++) sum[i][v] += b[i] * own[v];
                    }
                    for (int i = 0; i < HIGH; i++)
                        for (int v = 0; v < ACROSS; v++) store(da + (k + i) * TILE + c + v * LANES, sum[i][v]);
                }
        }
        for (int64_t k = 0; k < job.rank; k++) std::memcpy(dA + k * columns + j, da + k * TILE, width * sizeof(float));
    }
}

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) total += __builtin_popcountll(load<uint64_t>(bits + i));
    for (; i < bytes; i++) total += __builtin_popcount(bits[i]);
    return total;
}

// The first of `values` where `bits` are 1, zero elsewhere; and back: the entries of v where they are 1, one after the other.
#ifdef __AVX512F__
inline vec spread(vec values, uint32_t bits) { return (vec)_mm512_maskz_expand_ps((__mmask16)bits, (__m512)values); }
inline void append(vec v, uint32_t bits, float* out) {
    const uint32_t some = (1u << __builtin_popcount(bits)) - 1;
    _mm512_mask_storeu_ps(out, (__mmask16)some, _mm512_maskz_compress_ps((__mmask16)bits, (__m512)v));
}
#else
inline vec spread(vec values, uint32_t bits) {
    float from[LANES + 1], to[LANES];
    std::memcpy(from, &values, sizeof values);
    for (int l = 0, n = 0; l < LANES; n += bits >> l++ & 1) to[l] = bits >> l & 1 ? from[n] : 0;
    return load(to);
}
inline void append(vec v, uint32_t bits, float* out) {
    for (int l = 0; l < LANES; l++)
        if (bits >> l & 1) *out++ = v[l];
}
#endif

// Meet `count` entries a vector at a time: work(place, bits of the vector, how many are set before it).
template <class Work> void walk(const Mask& mask, int64_t count, int threads, const Work& work) {
    share((count + WALK - 1) / WALK, WALK, threads, [&](int64_t first, int64_t last, int) {
        int64_t before = count_bits(mask.bits, first * WALK / 8);
        for (int64_t i = first * WALK; i < std::min(count, last * WALK); i += LANES) {
            const uint32_t lanes = uint32_t((1 << std::min<int64_t>(LANES, count - i)) - 1), bits = mask.at(i) & lanes;
            work(i, bits, before);
            before += __builtin_popcount(bits);
        }
    });
}

template <class T> void expand(const float* values, int64_t known, const Mask& mask, int64_t count, void* out, int threads) {
    walk(mask, count, threads, [=](int64_t i, uint32_t bits, int64_t before) {
        write(spread(read(values + before, known - before), bits), (T*)out + i, count - i);
    });
}

template <class T> void compress(const void* from, const Mask& mask, int64_t count, float* out, int threads) {
    walk(mask, count, threads, [=](int64_t i, uint32_t bits, int64_t before) {
        append(read((const T*)from + i, count - i), bits, out + before);
    });
}

enum Type { FLOAT, BRAIN, HALVES };  // as in __init__.py

}  // namespace

// E = ((W + s B A) * M), or with `times` ((W * (1 + s B A)) * M), contiguous. W (rows, columns) with rows `ld` apart, A (rank,
// columns), B (rows, rank), `bits` of `bytes` bytes or null. Returns 0 where nothing was done.
extern "C" int sparsight_merge(const void* W, int type, int64_t rows, int64_t columns, int64_t ld, const float* A, const float* B,
                               int64_t rank, double scaling, const uint8_t* bits, int64_t bytes, int times, void* E,
                               int threads) {
    if (type == HALVES && !HALF) return 0;
    const int64_t panels = (columns + WIDE - 1) / WIDE;
    const Floats packed = zeros(panels * rank * WIDE);
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < rank; k++)
            std::memcpy(&packed[(p * rank + k) * WIDE], A + k * columns + p * WIDE,
                        std::min<int64_t>(WIDE, columns - p * WIDE) * sizeof(float));
    const Merge job{W, rows, columns, ld, packed.get(), B, rank, float(scaling), {bits, bytes}, E};
    const auto some = type == FLOAT   ? times ? merge_rows<float, true> : merge_rows<float, false>
                      : type == BRAIN ? times ? merge_rows<Brain, true> : merge_rows<Brain, false>
                                      : times ? merge_rows<Half, true> : merge_rows<Half, false>;
    share(rows, columns, threads, [&](int64_t first, int64_t last, int) { some(job, first, last); });
    return 1;
}

// dA (rank, columns) = s B^T D and dB (rows, rank) = s D A^T of D = dE * M, times W where it is given. Each thread sums a dA of
// its own rows; they are added in the order of the rows. Returns 0 where nothing was done.
extern "C" int sparsight_project(const void* dE, int type, int64_t rows, int64_t columns, int64_t ld, const void* W, int64_t ldw,
                                 const float* A, const float* B, int64_t rank, double scaling, const uint8_t* bits, int64_t bytes,
                                 float* dA, float* dB, int threads) {
    if (type == HALVES && !HALF) return 0;
    const int64_t padded = (rank + HIGH - 1) / HIGH * HIGH, high = (rows + ROWS - 1) / ROWS * ROWS;
    const Floats b = zeros(high * padded), db = zeros(high * padded);
    for (int64_t o = 0; o < rows; o++) std::memcpy(&b[o * padded], B + o * rank, rank * sizeof(float));
    const Project job{dE, W, rows, columns, ld, ldw, A, b.get(), rank, padded, {bits, bytes}, db.get()};
    const auto some = type == FLOAT ? project_rows<float> : type == BRAIN ? project_rows<Brain> : project_rows<Half>;
    std::vector<Floats> partial(std::max(1, threads));
    const int parts = share(rows, columns, threads, [&](int64_t first, int64_t last, int part) {
        if (part) partial[part] = zeros(rank * columns);
        some(job, first, last, part ? partial[part].get() : dA);
    });
    const float s = float(scaling);
    for (int part = 1; part < parts; part++)
        for (int64_t i = 0; i < rank * columns; i++) dA[i] += partial[part][i];
    for (int64_t i = 0; i < rank * columns; i++) dA[i] *= s;
    for (int64_t o = 0; o < rows; o++)
        for (int64_t k = 0; k < rank; k++) dB[o * rank + k] = s * db[o * padded + k];
    return 1;
}

// `out` (count,) of `type`: the float32 `values` in order where the bits are 1, +0 elsewhere. Returns 0 where nothing was done.
extern "C" int sparsight_expand(const float* values, int64_t known, const uint8_t* bits, int64_t bytes, int64_t count, int type,
                                void* out, int threads) {
    if (type == HALVES && !HALF) return 0;
    const auto run = type == FLOAT ? expand<float> : type == BRAIN ? expand<Brain> : expand<Half>;
    run(values, known, {bits, bytes}, count, out, threads);
    return 1;
}

// `out`: the entries of `from` (count,) where the bits are 1, in float32; as many as are set.
extern "C" int sparsight_compress(const void* from, int type, const uint8_t* bits, int64_t bytes, int64_t count, float* out,
                                  int threads) {
    if (type == HALVES && !HALF) return 0;
    const auto run = type == FLOAT ? compress<float> : type == BRAIN ? compress<Brain> : compress<Half>;
    run(from, {bits, bytes}, count, out, threads);
    return 1;
}

extern "C" void sparsight_count(const uint8_t* bits, int64_t bytes, int64_t* total) { *total = count_bits(bits, bytes); }

// `mask` (count,) holds bytes of 0 and 1; the last byte of bits is padded with zeros.
extern "C" void sparsight_pack(const uint8_t* mask, int64_t count, uint8_t* bits) {
    for (int64_t i = 0; i < count / 8; i++) bits[i] = uint8_t((load<uint64_t>(mask + 8 * i) * 0x0102040810204080u) >> 56);
    for (int64_t i = count / 8 * 8; i < count; i++) bits[i / 8] = uint8_t((i % 8 ? bits[i / 8] : 0) | mask[i] << i % 8);
}

extern "C" void sparsight_unpack(const uint8_t* bits, int64_t count, uint8_t* mask) {
    for (int64_t i = 0; i < count / 8; i++) {
        const uint64_t one = (bits[i] * 0x0101010101010101u) & 0x8040201008040201u;  // byte k holds bit k in its place
        store(mask + 8 * i, (one + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u);
    }
    for (int64_t i = count / 8 * 8; i < count; i++) mask[i] = bits[i / 8] >> i % 8 & 1;
}
