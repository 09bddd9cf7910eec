// Products in bfloat16 by matrix tiles: sixteen rows of 32 weights times up to sixteen tokens in one instruction.
//
// Kept values are expanded into tiles that stay in the first cache and are multiplied from there, so that 32 tokens cost little
// more than one. For more tokens a panel of 32 rows is expanded, and multiplied with a panel of inputs, in the second cache.
// Sums are float32, of pairs of columns.

#include "tiles.h"

#if defined(SPARSIGHT_TILES)

namespace {

constexpr int64_t WIDE = 32;                    // columns of a tile
constexpr int64_t CHUNKS = 4;                   // tiles that are expanded before they are multiplied
constexpr int64_t BLOCK = CHUNKS * WIDE;
constexpr int64_t FEW_GROUPS = 4, MOST_GROUPS = 16;  // of tokens, that rows are expanded for each time; that share a panel
constexpr int64_t PANEL = 64;                        // chunks of a panel, which stays in the second cache
constexpr int64_t MOST_ROWS = 4096;                  // whose sums are kept between panels

inline __m512i brains(__m512i values) { return values; }
inline __m512i brains(__m256i codes) {  // exact: eight bits
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline __m512i load_some(const uint16_t* from, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, from); }
inline __m256i load_some(const int8_t* from, uint32_t mask) { return _mm256_maskz_loadu_epi8(mask, from); }
inline __m512i load_all(const uint16_t* from) { return _mm512_loadu_si512(from); }
inline __m256i load_all(const int8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m512i expand(uint32_t mask, __m512i v) { return expand_words(mask, v); }
inline __m256i expand(uint32_t mask, __m256i v) { return _mm512_castsi512_si256(expand_bytes(mask, _mm512_castsi256_si512(v))); }

// Up to sixteen rows, and how far each has been read.
template <class Value, bool ALL> struct Rows {
    const Value *next[HIGH], *end;
    const uint8_t* bits[HIGH];
    int64_t ahead[HIGH], columns;  // values to the row's place in the next sixteen rows, which is prefetched
    int count;

    Rows(const Matrix& m, int64_t row, int64_t last) : columns(m.columns), count(int(std::min<int64_t>(HIGH, last - row))) {
        end = (const Value*)m.values + (ALL ? m.rows * m.columns : m.offset[m.rows]);
        for (int r = 0; r < count; r++) {
            const int64_t from = row + r, then = std::min(m.rows, from + HIGH);
            next[r] = (const Value*)m.values + (ALL ? from * m.columns : m.offset[from]);
            ahead[r] = ALL ? HIGH * m.columns : m.offset[then] - m.offset[from];
            bits[r] = m.bits + from * m.pitch();
        }
    }

    // Columns from `from` on of row `r`, into tiles that begin at `to`.
    void read(int r, int64_t from, uint16_t* to) {
        const Value* v = next[r];
        const uint8_t* b = ALL ? nullptr : bits[r] + from / 8;
        const int64_t left = columns - from;
        to += r * WIDE;
        if (left >= BLOCK && end - v >= BLOCK + WIDE) {
            if constexpr (!ALL) __builtin_prefetch(b + (columns + 7) / 8 * HIGH, 0, 2);
            #pragma GCC unroll 8
            for (int64_t c = 0; c < CHUNKS; c += 2) {
                __builtin_prefetch(v + ahead[r], 0, 2);
                if (ALL && sizeof(Value) == 2) __builtin_prefetch(v + ahead[r] + WIDE, 0, 2);
                const uint64_t mask = ALL ? 0 : load<uint64_t>(b + c * WIDE / 8);
                for (int64_t half = 0; half < 2; half++) {
                    const uint32_t own = uint32_t(mask >> 32 * half);
                    auto w = load_all(v);
                    if constexpr (!ALL) w = expand(own, w);
                    _mm512_store_si512(to + (c + half) * HIGH * WIDE, brains(w));
                    v += ALL ? WIDE : ::count(own);
                }
            }
        } else {
            for (int64_t c = 0; c < CHUNKS && c * WIDE < left; c++) {
                const int64_t known = std::min(WIDE, left - c * WIDE);
                const uint32_t all = _bzhi_u32(~0u, unsigned(known));
                const uint32_t own = ALL ? all : uint32_t(load_bits(b + c * WIDE / 8, (known + 7) / 8)) & all;
                const int kept = ::count(own);
                auto w = load_some(v, _bzhi_u32(~0u, unsigned(kept)));
                if constexpr (!ALL) w = expand(own, w);
                _mm512_store_si512(to + c * HIGH * WIDE, brains(w));
                v += kept;
            }
        }
        next[r] = v;
    }
};

// Inputs as tiles: (groups of tokens, chunks, 16 pairs of columns, tokens of a group), a pair in 32 bits.
struct Inputs {
    int64_t chunks, tokens, groups;
    int wide;  // tokens of a group
    Lines<uint32_t> pairs;

    Inputs(const uint16_t* x, int64_t columns, int64_t tokens)
        : chunks((columns + WIDE - 1) / WIDE), tokens(tokens), groups((tokens + HIGH - 1) / HIGH),
          wide(int(std::min<int64_t>(HIGH, tokens))), pairs(groups * chunks * HIGH * wide) {
        uint32_t* to = pairs.start;
        for (int64_t group = 0; group < groups; group++, x += HIGH * columns)
            for (int64_t c = 0; c < chunks * WIDE; c += 2, to += wide)
                for (int64_t t = 0; t < in_group(group); t++) {
                    const uint16_t* const from = x + t * columns + c;
                    if (c + 2 <= columns) to[t] = load<uint32_t>(from);
                    else if (c < columns) to[t] = *from;
                }
    }
    const uint32_t* tile(int64_t group, int64_t chunk) const { return pairs.start + (group * chunks + chunk) * HIGH * wide; }
    int64_t in_group(int64_t group) const { return std::min<int64_t>(HIGH, tokens - group * HIGH); }
};

// What becomes of the sums (sixteen rows, tokens of a group) of rows from `row` on.
struct Sums {
    uint16_t* out;  // (tokens, rows)
    const uint16_t* bias;
    const float* scale;
    int64_t rows;

    void put(const float* sums, int wide, int64_t row, int count, int64_t token, int64_t tokens) const {
        const __mmask16 known = __mmask16(_bzhi_u32(~0u, unsigned(count)));
        const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(wide));
        const __m512 by = scale ? _mm512_maskz_loadu_ps(known, scale + row) : _mm512_set1_ps(1);
        __m512 plus = _mm512_setzero_ps();
        if (bias) plus = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(known, bias + row)), 16));
        for (int64_t t = 0; t < tokens; t++) {
            const __m512 sum = _mm512_fmadd_ps(_mm512_i32gather_ps(places, sums + t, 4), by, plus);
            _mm256_mask_storeu_epi16(out + (token + t) * rows + row, known, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
};

// Up to sixteen rows times `GROUPS` groups of tokens from `group` on, one or two: their sums stay in registers.
template <int GROUPS, class Value, bool ALL>
void multiply_few(const Matrix& m, int64_t row, int64_t last, const Inputs& in, int64_t group, const Sums& sums) {
    Rows<Value, ALL> rows(m, row, last);
    alignas(64) uint16_t room[CHUNKS][HIGH * WIDE];
    alignas(64) float sum[4][HIGH * HIGH];
    const int64_t pitch = 4 * in.wide;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t first = 0; first < in.chunks; first += CHUNKS) {
        for (int r = 0; r < rows.count; r++) rows.read(r, first * WIDE, room[0]);
        ordered();
        const int64_t chunks = std::min(CHUNKS, in.chunks - first);
        const auto weights = [&](int64_t chunk) { return room[chunk]; };
        const auto inputs = [&](int64_t other, int64_t chunk) { return in.tile(group + other, first + chunk); };
        if constexpr (GROUPS == 1) {  // sums of every fourth tile
            _tile_loadd(4, weights(0), 64);
            _tile_loadd(6, inputs(0, 0), pitch);
            _tile_dpbf16ps(0, 4, 6);
            if (chunks > 1) {
                _tile_loadd(5, weights(1), 64);
                _tile_loadd(7, inputs(0, 1), pitch);
                _tile_dpbf16ps(1, 5, 7);
            }
            if (chunks > 2) {
                _tile_loadd(4, weights(2), 64);
                _tile_loadd(6, inputs(0, 2), pitch);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (chunks > 3) {
                _tile_loadd(5, weights(3), 64);
                _tile_loadd(7, inputs(0, 3), pitch);
                _tile_dpbf16ps(3, 5, 7);
            }
        } else {  // sums of every second tile, for two groups
            for (int64_t c = 0; c < chunks; c += 2) {
                _tile_loadd(4, weights(c), 64);
                _tile_loadd(6, inputs(0, c), pitch);
                _tile_loadd(7, inputs(1, c), pitch);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (c + 1 == chunks) break;
                _tile_loadd(5, weights(c + 1), 64);
                _tile_loadd(6, inputs(0, c + 1), pitch);
                _tile_loadd(7, inputs(1, c + 1), pitch);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        ordered();
    }
    _tile_stored(0, sum[0], pitch);
    _tile_stored(1, sum[1], pitch);
    _tile_stored(2, sum[2], pitch);
    _tile_stored(3, sum[3], pitch);
    ordered();
    for (int i = 0; i < HIGH * in.wide; i++) {
        if constexpr (GROUPS == 1) sum[0][i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
        else sum[0][i] += sum[2][i], sum[1][i] += sum[3][i];
    }
    for (int g = 0; g < GROUPS; g++) sums.put(sum[g], in.wide, row, rows.count, (group + g) * HIGH, in.in_group(group + g));
}

// Two tiles of rows `above` and `below` times one or two groups of tokens, for `chunks` chunks from `first` on. `upper` and
// `lower` hold their sums (groups, 256), and are set where the first chunk is the very first.
template <bool TWO>
void multiply_pair(const uint16_t* above, const uint16_t* below, const Inputs& in, int64_t group, int64_t first, int64_t chunks,
                   float* upper, float* lower) {
    if (first) {
        _tile_loadd(0, upper, 64);
        _tile_loadd(2, lower, 64);
        if constexpr (TWO) _tile_loadd(1, upper + HIGH * HIGH, 64);
        if constexpr (TWO) _tile_loadd(3, lower + HIGH * HIGH, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t chunk = first; chunk < first + chunks; chunk++, above += HIGH * WIDE, below += HIGH * WIDE) {
        _tile_loadd(4, above, 64);
        _tile_loadd(6, in.tile(group, chunk), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, below, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (TWO) {
            _tile_loadd(7, in.tile(group + 1, chunk), 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, upper, 64);
    _tile_stored(2, lower, 64);
    if constexpr (TWO) _tile_stored(1, upper + HIGH * HIGH, 64);
    if constexpr (TWO) _tile_stored(3, lower + HIGH * HIGH, 64);
    ordered();
}

// All rows from `begin` to `last` times the tokens of groups from `group` to `end`.
template <class Value, bool ALL>
void multiply_many(const Matrix& m, int64_t begin, int64_t last, const Inputs& in, int64_t group, int64_t end, const Sums& sums) {
    const int64_t apart = (end - group) * HIGH * HIGH;
    std::vector<Rows<Value, ALL>> rows;
    for (int64_t row = begin; row < last; row += HIGH) rows.emplace_back(m, row, last);
    const int64_t tiles = int64_t(rows.size());
    const Lines<float> sum((tiles + 1) * apart);
    const Lines<uint16_t> room(2 * PANEL * HIGH * WIDE);
    for (int64_t first = 0; first < in.chunks; first += PANEL) {
        const int64_t chunks = std::min(PANEL, in.chunks - first);
        for (int64_t i = 0; i < tiles; i += 2) {  // a last tile alone is multiplied with another that nobody looks at
            uint16_t* const halves[2] = {room.start, room.start + PANEL * HIGH * WIDE};
            for (int64_t half = 0; half < std::min<int64_t>(2, tiles - i); half++)
                for (int64_t chunk = 0; chunk < chunks; chunk += CHUNKS)
                    for (int r = 0; r < rows[size_t(i + half)].count; r++)
                        rows[size_t(i + half)].read(r, (first + chunk) * WIDE, halves[half] + chunk * HIGH * WIDE);
            ordered();
            for (int64_t g = group; g < end; g += 2) {
                float* const upper = sum.start + i * apart + (g - group) * HIGH * HIGH;
                const auto run = g + 1 < end ? multiply_pair<true> : multiply_pair<false>;
                run(halves[0], halves[1], in, g, first, chunks, upper, upper + apart);
            }
        }
    }
    for (int64_t i = 0; i < tiles; i++)
        for (int64_t g = group; g < end; g++)
            sums.put(sum.start + i * apart + (g - group) * HIGH * HIGH, HIGH, begin + i * HIGH, rows[size_t(i)].count, g * HIGH, in.in_group(g));
}

template <class Value, bool ALL>
void multiply_by_tiles(const Matrix& m, const uint16_t* x, int64_t tokens, const Sums& sums, int threads) {
    const Inputs in(x, m.columns, tokens);
    share(m.rows, m.columns, HIGH, threads, [&](int64_t first, int64_t last) {
        const TileUse use(in.wide);
        if (in.groups <= FEW_GROUPS) {
            for (int64_t row = first; row < last; row += HIGH)
                for (int64_t group = 0; group < in.groups; group += 2) {
                    const auto run = group + 1 < in.groups ? multiply_few<2, Value, ALL> : multiply_few<1, Value, ALL>;
                    run(m, row, last, in, group, sums);
                }
            return;
        }
        for (int64_t row = first; row < last; row += MOST_ROWS)
            for (int64_t group = 0; group < in.groups; group += MOST_GROUPS) {
                const int64_t end = std::min(in.groups, group + MOST_GROUPS);
                multiply_many<Value, ALL>(m, row, std::min(last, row + MOST_ROWS), in, group, end, sums);
            }
    });
}

}  // namespace

#endif

// Whether products by tiles run here.
extern "C" int sparsight_has_tiles() {
#if defined(SPARSIGHT_TILES)
    return may_use_tiles();
#else
    return 0;
#endif
}

// `out` (tokens, rows) = x (tokens, columns) W^T + bias (rows,) or none, in bfloat16; with `scale` (rows,) the values are int8.
// Without bits W is dense. Returns 0 where there are no tiles.
extern "C" int sparsight_product_tiles(const void* values, const float* scale, const uint8_t* bits, const int64_t* offset,
                                       int64_t rows, int64_t columns, const void* x, int64_t tokens, const void* bias,
                                       void* out, int threads) {
#if defined(SPARSIGHT_TILES)
    if (!may_use_tiles()) return 0;
    if (!tokens) return 1;  // tiles without columns are refused by the CPU
    const Matrix m{values, bits, offset, rows, columns};
    const Sums sums{(uint16_t*)out, (const uint16_t*)bias, scale, rows};
    const auto run = scale ? (bits ? multiply_by_tiles<int8_t, false> : multiply_by_tiles<int8_t, true>)
                           : (bits ? multiply_by_tiles<uint16_t, false> : multiply_by_tiles<uint16_t, true>);
    run(m, (const uint16_t*)x, tokens, sums, threads);
    return 1;
#else
    (void)values, (void)scale, (void)bits, (void)offset, (void)rows, (void)columns, (void)x, (void)tokens, (void)bias, (void)out, (void)threads;
    return 0;
#endif
}
