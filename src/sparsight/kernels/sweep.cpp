// The fused SparseGPT sweep over one block of at most 128 columns, and the update of the columns behind it.
//
// Rows are independent. A tile of rows is turned so that a vector holds one column of many rows. Its columns are swept in
// panels of eight, held in registers from the gathering of their pending updates (left-looking, in the order of the plain
// column loop) to the choice of the group and the last division. The update behind the block takes only the columns whose
// error is not zero: half of the work of a dense product at 50 %, made real by a list of errors per row against a packed
// tile of U in L1.
//
// GCC vector extensions, which any CPU compiles; two small functions have a form of their own for AVX-512.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "threads.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, PAIR = 2;  // floats of a vector; vectors of rows swept together
#elif defined(__AVX__)
constexpr int LANES = 8, PAIR = 1;
#else
constexpr int LANES = 4, PAIR = 1;
#endif
constexpr int BLOCK = 128;          // columns of a block, at most
constexpr int PANEL = 8;            // columns held in registers
constexpr int TILE = PAIR * LANES;  // rows swept together
constexpr int ROWS = 128;           // rows a thread takes at a time
constexpr int ACROSS = 4;            // vectors of a row updated together behind the block
constexpr int WIDE = ACROSS * LANES; // columns updated together behind the block
constexpr int DEEP = 64;            // rows of U in one packed tile: DEEP * WIDE floats stay in L1

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const float* p) { return load<vec>(p); }
inline vec load(const float* p, int count) {
    vec v = {};
    if (count >= LANES) return load(p);
    std::memcpy(&v, p, count * sizeof(float));
    return v;
}
inline void store(float* p, vec v, int count) {
    if (count >= LANES) return store(p, v);
    std::memcpy(p, &v, count * sizeof(float));
}

struct Free { void operator()(float* p) const { std::free(p); } };
using Floats = std::unique_ptr<float[], Free>;
Floats floats(size_t count) { return Floats((float*)std::aligned_alloc(64, (count * 4 + 64) / 64 * 64)); }

struct Job {
    float* W; int64_t rows, columns, ld;       // (rows, columns)
    const float* U; int64_t ldu;               // (columns, columns) upper triangular
    const float* scale;                     // (columns,) 1 / diag(U)
    int64_t start, stop; const uint8_t* keep;  // (rows, stop - start), or null for n:m
    int n, m;
    const float *near, *behind;             // U packed by panel, and by tile behind the block
    int width() const { return int(stop - start); }
};

struct Tile {  // column after column, each of TILE rows
    alignas(64) float w[BLOCK][TILE];
    alignas(64) float error[BLOCK][TILE];
    alignas(64) int32_t keep[BLOCK][TILE];  // 0 or -1
};

struct Errors {  // the non-zero ones of DEEP columns of ROWS rows, with their place in U's tile
    float value[BLOCK / DEEP][ROWS][DEEP + LANES];
    int32_t place[BLOCK / DEEP][ROWS][DEEP + LANES];
    int count[BLOCK / DEEP][ROWS];
};

#ifdef __AVX512F__
inline void transpose(vec (&v)[LANES]) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int k = 1; k < LANES; k *= 2) {
        const ivec odd = (lane & k) != 0, low = odd ? lane - k + LANES : lane, high = odd ? lane + LANES : lane + k;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & k) continue;
            const __m512 a = (__m512)v[i], b = (__m512)v[i + k];
            v[i] = (vec)_mm512_permutex2var_ps(a, (__m512i)low, b);
            v[i + k] = (vec)_mm512_permutex2var_ps(a, (__m512i)high, b);
        }
    }
}

inline int append(vec error, ivec places, float* value, int32_t* place) {
    const __mmask16 found = _mm512_cmp_ps_mask((__m512)error, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(found, (__m512)error));
    _mm512_storeu_si512(place, _mm512_maskz_compress_epi32(found, (__m512i)places));
    return __builtin_popcount(found);
}
#else
inline void transpose(vec (&v)[LANES]) {
    float from[LANES][LANES], to[LANES][LANES];
    std::memcpy(from, v, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j][i] = from[i][j];
    std::memcpy(v, to, sizeof to);
}

inline int append(vec error, ivec places, float* value, int32_t* place) {
    int found = 0;
    for (int i = 0; i < LANES; i++) value[found] = error[i], place[found] = places[i], found += error[i] != 0;
    return found;
}
#endif

// Keep the n largest |w| / d of M columns, the lower index of equal ones.
template <int M>
inline void choose(const vec (*w)[PAIR], const float* scale, int n, ivec (*keep)[PAIR]) {
    for (int half = 0; half < PAIR; half++) {
        vec score[M];
        ivec rank[M];
        for (int j = 0; j < M; j++) score[j] = (vec)((ivec)w[j][half] & 0x7fffffff) * scale[j], rank[j] = ivec{};
        for (int i = 0; i < M; i++)
            for (int j = i + 1; j < M; j++) {
                const ivec later = score[j] > score[i];  // -1 where true
                rank[i] -= later, rank[j] += later + 1;
            }
        for (int j = 0; j < M; j++) keep[j][half] = rank[j] < n;
    }
}

// Sweep the PANEL columns from `first`; M: columns of a group to choose from, 0 where the mask is given.
template <int M>
void sweep_panel(Tile& t, const float* u, const float* scale, int first, int n) {  // u (first + PANEL, PANEL)
    vec w[PANEL][PAIR];
    ivec keep[PANEL][PAIR];
    for (int c = 0; c < PANEL; c++)
        for (int half = 0; half < PAIR; half++) w[c][half] = load(t.w[first + c] + half * LANES);
    for (int i = 0; i < first; i++, u += PANEL)
        for (int half = 0; half < PAIR; half++) {
            const vec error = load(t.error[i] + half * LANES);
            for (int c = 0; c < PANEL; c++) w[c][half] -= error * u[c];
        }
#pragma GCC unroll 8
    for (int i = 0; i < PANEL; i++, u += PANEL) {
        if constexpr (M > 0) {
            if (i % M == 0) choose<M>(w + i, scale + i, n, keep + i);
        }
        for (int half = 0; half < PAIR; half++) {
            if constexpr (M == 0) keep[i][half] = load<ivec>(t.keep[first + i] + half * LANES);
            const vec error = (vec)((ivec)(w[i][half] * scale[i]) & ~keep[i][half]);
            store(t.w[first + i] + half * LANES, (ivec)w[i][half] & keep[i][half]);
            store(t.error[first + i] + half * LANES, error);
#pragma GCC unroll 8
            for (int c = i + 1; c < PANEL; c++) w[c][half] -= error * u[c];
        }
    }
}

// Sweep the block, and fetch the rows after this tile meanwhile.
void sweep_tile(Tile& t, const Job& job, int64_t row) {
    const auto sweep = job.keep ? sweep_panel<0> : job.m == 2 ? sweep_panel<2> : job.m == 4 ? sweep_panel<4> : sweep_panel<8>;
    for (int first = 0; first < job.width(); first += PANEL) {
        for (int64_t r = row + TILE + first * TILE / BLOCK; r < row + TILE + (first + PANEL) * TILE / BLOCK && r < job.rows; r++)
            for (int i = 0; i < job.width(); i += 16) __builtin_prefetch(job.W + r * job.ld + job.start + i, 1);
        sweep(t, job.near + (size_t)first * BLOCK, job.near + (size_t)BLOCK * BLOCK + first, first, job.n);
    }
}

inline ivec spread(const uint8_t* keep, int count) {
    uint8_t part[LANES] = {};
    if (count < LANES) keep = (const uint8_t*)std::memcpy(part, keep, count);
    int32_t mask[LANES];
    for (int i = 0; i < LANES; i++) mask[i] = -(int32_t)keep[i];
    return load<ivec>(mask);
}

// Read a tile, zero beyond the block; rows beyond `count` repeat the last one.
void read_tile(Tile& t, const Job& job, int64_t row, int count) {
    const int width = job.width();
    for (int i = 0; i < width; i += LANES)
        for (int from = 0; from < TILE; from += LANES) {
            vec w[LANES], keep[LANES];
            for (int r = 0; r < LANES; r++) {
                const int64_t at = row + (from + r < count ? from + r : count - 1);
                w[r] = load(job.W + at * job.ld + job.start + i, width - i);
                if (job.keep) keep[r] = (vec)spread(job.keep + at * width + i, width - i);
            }
            transpose(w);
            for (int c = 0; c < LANES; c++) store(t.w[i + c] + from, w[c]), store(t.error[i + c] + from, vec{});
            if (!job.keep) continue;
            transpose(keep);
            for (int c = 0; c < LANES; c++) store(t.keep[i + c] + from, keep[c]);
        }
}

// Write a tile back and list its errors.
void write_tile(const Tile& t, const Job& job, int64_t row, int count, Errors& errors, int at) {
    const int width = job.width();
    ivec lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int i = 0; i < width; i += LANES)
        for (int from = 0; from < TILE && from < count; from += LANES) {
            vec w[LANES], error[LANES];
            for (int c = 0; c < LANES; c++) w[c] = load(t.w[i + c] + from), error[c] = load(t.error[i + c] + from);
            transpose(w), transpose(error);
            const ivec places = (i % DEEP + lane) * WIDE;
            for (int r = from; r < from + LANES && r < count; r++) {
                store(job.W + (row + r) * job.ld + job.start + i, w[r - from], width - i);
                float* value = errors.value[i / DEEP][at + r];
                int32_t* place = errors.place[i / DEEP][at + r];
                int& found = errors.count[i / DEEP][at + r];
                if (i % DEEP == 0) found = 0;
                found += append(error[r - from], places, value + found, place + found);
            }
        }
}

inline void update_row(float* w, const float* value, const int32_t* place, int count, const float* u) {
    vec a[ACROSS];
    for (int v = 0; v < ACROSS; v++) a[v] = load(w + v * LANES);
    for (int k = 0; k < count; k++)
        for (int v = 0; v < ACROSS; v++) a[v] -= value[k] * load(u + place[k] + v * LANES);
    for (int v = 0; v < ACROSS; v++) store(w + v * LANES, a[v]);
}

// W[:, stop:] -= Error @ U[start:stop, stop:]
void update_behind(const Job& job, int64_t row, int count, const Errors& errors) {
    const int64_t behind = job.columns - job.stop;
    alignas(64) float edge[WIDE] = {};
    for (int64_t j = 0; j < behind; j += WIDE) {
        const bool whole = j + WIDE <= behind;
        const size_t bytes = (whole ? WIDE : behind - j) * sizeof(float);
        for (int k = 0; k * DEEP < job.width(); k++) {
            const float* u = job.behind + (j * (BLOCK / DEEP) + (int64_t)k * WIDE) * DEEP;
            for (int r = 0; r < count; r++) {
                float* w = job.W + (row + r) * job.ld + job.stop + j;
                for (int v = 0; v < ACROSS * DEEP / BLOCK; v++)  // all of the row's next tile, over all k
                    __builtin_prefetch(w + WIDE + (k * ACROSS * DEEP / BLOCK + v) * LANES, 1);
                if (!whole) std::memcpy(edge, w, bytes);
                update_row(whole ? w : edge, errors.value[k][r], errors.place[k][r], errors.count[k][r], u);
                if (!whole) std::memcpy(w, edge, bytes);
            }
        }
    }
}

void sweep_rows(const Job& job, std::atomic<int64_t>& next) {
    const auto t = std::make_unique<Tile>();
    const auto errors = std::make_unique<Errors>();
    for (int64_t row; (row = next.fetch_add(ROWS)) < job.rows;) {
        const int count = int(job.rows - row < ROWS ? job.rows - row : ROWS);
        for (int at = 0; at < count; at += TILE) {
            const int here = count - at < TILE ? count - at : TILE;
            read_tile(*t, job, row + at, here);
            sweep_tile(*t, job, row + at);
            write_tile(*t, job, row + at, here, *errors, at);
        }
        update_behind(job, row, count, *errors);
    }
}

Floats pack_near(const Job& job) {  // panel after panel, each (BLOCK, PANEL), then the scales; zero beyond the block
    const int width = job.width();
    Floats near = floats(BLOCK * BLOCK + BLOCK);
    for (int j = 0; j < BLOCK; j++) {
        for (int i = 0; i < BLOCK; i++)
            near[(size_t)(j / PANEL * BLOCK + i) * PANEL + j % PANEL] =
                i < width && j < width ? job.U[(job.start + i) * job.ldu + job.start + j] : 0;
        near[BLOCK * BLOCK + j] = j < width ? job.scale[job.start + j] : 0;
    }
    return near;
}

Floats pack_behind(const Job& job) {  // tile after tile, each (BLOCK, WIDE), zero beyond the last column
    const int64_t behind = job.columns - job.stop, tiles = (behind + WIDE - 1) / WIDE;
    Floats packed = floats((size_t)tiles * BLOCK * WIDE);
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int i = 0; i < job.width(); i++) {
            const float* u = job.U + (job.start + i) * job.ldu + job.stop + tile * WIDE;
            const int64_t here = behind - tile * WIDE < WIDE ? behind - tile * WIDE : WIDE;
            float* to = &packed[((size_t)tile * BLOCK + i) * WIDE];
            std::memcpy(to, u, here * sizeof(float));
            std::memset(to + here, 0, (WIDE - here) * sizeof(float));
        }
    return packed;
}

}  // namespace

// In place on W. `keep` null: the n of every m to keep are chosen on the way; m is 2, 4 or 8.
extern "C" void sparsight_sweep(float* W, int64_t rows, int64_t columns, int64_t ld, const float* U, int64_t ldu, const float* scale,
                                int64_t start, int64_t stop, const uint8_t* keep, int n, int m, int threads) {
    Job job{W, rows, columns, ld, U, ldu, scale, start, stop, keep, n, m, nullptr, nullptr};
    const Floats near = pack_near(job), behind = pack_behind(job);
    job.near = near.get(), job.behind = behind.get();
    std::atomic<int64_t> next{0};
    in_parts(int(std::min<int64_t>(threads, (rows + ROWS - 1) / ROWS)), [&](int) { sweep_rows(job, next); });
}
