// From dense rows to bits and kept values, and back.

#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t HUGE_PAGE = 1 << 21;

// Let large new memory come in huge pages: the first touch of every small one takes longer than what is written there.
inline void advise([[maybe_unused]] void* from, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t first = (uintptr_t(from) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t last = (uintptr_t(from) + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: nothing is wrong where it is not taken
#endif
}

// Bits and kept values of dense rows; what is kept is every value but +0, by its bytes. Returns how many.
template <class Value> int64_t pack_rows(const Value* from, int64_t rows, int64_t columns, uint8_t* bits, Value* values) {
    const Value* const start = values;
    const int64_t pitch = (columns + 7) / 8;
    for (int64_t row = 0; row < rows; row++, from += columns, bits += pitch) {
        int64_t c = 0;
#if defined(SPARSIGHT_AVX512)
        constexpr int64_t STEP = 64 / sizeof(Value);
        for (; c + STEP <= columns; c += STEP) {
            const __m512i v = _mm512_loadu_si512(from + c);
            uint64_t mask;
            if constexpr (sizeof(Value) == 1) mask = _mm512_test_epi8_mask(v, v);
            else if constexpr (sizeof(Value) == 2) mask = _mm512_test_epi16_mask(v, v);
            else mask = _mm512_test_epi32_mask(v, v);
            std::memcpy(bits + c / 8, &mask, STEP / 8);
            if (values) {  // stored whole: `values` has room for a step more
                __m512i kept;
                if constexpr (sizeof(Value) == 1) kept = _mm512_maskz_compress_epi8(mask, v);
                else if constexpr (sizeof(Value) == 2) kept = _mm512_maskz_compress_epi16(__mmask32(mask), v);
                else kept = _mm512_maskz_compress_epi32(__mmask16(mask), v);
                _mm512_storeu_si512(values, kept);
                values += count(mask);
            }
        }
#endif
        for (; c < columns; c += 8) {
            uint8_t byte = 0;
            for (int64_t i = c; i < std::min(c + 8, columns); i++)
                if (from[i] != 0) {
                    byte = uint8_t(byte | 1 << (i - c));
                    *values++ = from[i];
                }
            bits[c / 8] = byte;
        }
    }
    return values - start;
}

}  // namespace

// Where the values of each row begin: `offset` (rows + 1,).
extern "C" int sparsight_offsets(const uint8_t* bits, int64_t rows, int64_t pitch, int64_t* offset) {
    offset[0] = 0;
    for (int64_t row = 0; row < rows; row++, bits += pitch) {
        int64_t total = 0, i = 0;
        for (; i + 8 <= pitch; i += 8) total += count(load<uint64_t>(bits + i));
        if (i < pitch) total += count(load_bits(bits + i, pitch - i));
        offset[row + 1] = offset[row] + total;
    }
    return 1;
}

// `out` (last - first, columns): dense rows of values of `size` bytes each.
extern "C" int sparsight_expand_rows(const void* values, int size, const uint8_t* bits, const int64_t* offset, int64_t rows,
                                     int64_t columns, int64_t first, int64_t last, void* out, int threads) {
    const Matrix m{values, bits, offset, rows, columns};
    advise(out, size_t((last - first) * columns * size));
    share(last - first, columns, 1, threads, [&](int64_t from, int64_t to) {
        char* place = (char*)out + from * columns * size;
        if (size == 1) expand_rows(m, first + from, first + to, (uint8_t*)place);
        else if (size == 2) expand_rows(m, first + from, first + to, (uint16_t*)place);
        else expand_rows(m, first + from, first + to, (uint32_t*)place);
    });
    return 1;
}

// `bits` (rows, ceil(columns / 8)) and `values`, which has room for rows * columns and 64 bytes more; `kept`: how many.
extern "C" int sparsight_pack_rows(const void* from, int size, int64_t rows, int64_t columns, uint8_t* bits, void* values,
                                   int64_t* kept) {
    if (size == 1) *kept = pack_rows((const uint8_t*)from, rows, columns, bits, (uint8_t*)values);
    else if (size == 2) *kept = pack_rows((const uint16_t*)from, rows, columns, bits, (uint16_t*)values);
    else *kept = pack_rows((const uint32_t*)from, rows, columns, bits, (uint32_t*)values);
    return 1;
}

// The sum of 64-bit words, read in as many streams as products have: how fast memory can be read.
extern "C" int sparsight_read(const uint64_t* from, int64_t words, uint64_t* total, int threads) {
    std::vector<uint64_t> sums(size_t(threads), 0);
    const int64_t part = words / threads / STREAMS / 8 * 8;
    in_parts(threads, [&](int thread) {
        const uint64_t* start = from + thread * part * STREAMS;
        uint64_t sum[STREAMS][8] = {};
        for (int64_t i = 0; i < part; i += 8)
            for (int s = 0; s < STREAMS; s++) {
                prefetch(start + s * part + i);
                for (int k = 0; k < 8; k++) sum[s][k] += start[s * part + i + k];
            }
        for (auto& stream : sum)
            for (const uint64_t lane : stream) sums[size_t(thread)] += lane;
    });
    *total = 0;
    for (const uint64_t sum : sums) *total += sum;
    return 1;
}
