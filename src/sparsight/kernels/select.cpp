// Selection by rank: which entries of a row, or of a group, are the largest; of equal ones the lower index.
//
// A row's threshold is found by bisection over the bits of its floats, which count in their order: about twenty passes of
// one comparison per entry, with no sort and no copy. A group's entries are ranked by comparing all pairs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t CHUNK = 1 << 16;
constexpr int LANES = 16, STRETCH = 1024;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

int64_t rank_of(float value) {  // -0.0 comes right before 0.0
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

float value_of(int64_t rank) {
    int32_t bits = int32_t(rank);
    bits ^= (bits >> 31) & 0x7fffffff;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

int64_t reaching(const float* score, int64_t columns, float level) {
    int64_t total = 0;
    for (int64_t from = 0; from < columns; from += CHUNK) {
        const int64_t to = from + CHUNK < columns ? from + CHUNK : columns;
        int32_t count = 0;
        for (int64_t i = from; i < to; i++) count += score[i] >= level;
        total += count;
    }
    return total;
}

void keep_row(const float* score, int64_t columns, int64_t count, uint8_t* keep) {
    float least = score[0], most = score[0];
    for (int64_t i = 0; i < columns; i++) {
        least = score[i] < least ? score[i] : least;
        most = score[i] > most ? score[i] : most;
    }
    int64_t low = rank_of(least), high = rank_of(most);  // at least `count` reach low; fewer reach high + 1
    bool exact = false;
    while (low < high && !exact) {
        const int64_t middle = low + (high - low + 1) / 2, here = reaching(score, columns, value_of(middle));
        if (here < count) high = middle - 1;
        else low = middle;
        exact = here == count;
    }
    const float level = value_of(low);
    if (exact) {
        for (int64_t i = 0; i < columns; i++) keep[i] = score[i] >= level;
        return;
    }
    int64_t room = count;
    for (int64_t i = 0; i < columns; i++) room -= score[i] > level;
    for (int64_t i = 0; i < columns; i++) {
        keep[i] = score[i] > level || (score[i] == level && room > 0);
        room -= score[i] == level;
    }
}

// Each entry meets its neighbours at a distance of 1 to M - 1, as far as they are of its own group.
template <int M>
void keep_groups(const float* score, int64_t entries, int n, uint8_t* keep) {
    float buffer[M + STRETCH + LANES + M] = {}, *const here = buffer + M;
    ivec after[M], before[M];
    for (int k = 1; k < M; k++)
        for (int l = 0; l < LANES; l++) after[k][l] = l % M + k < M, before[k][l] = l % M >= k;
    for (int64_t from = 0; from < entries; from += STRETCH) {
        const int count = entries - from < STRETCH ? int(entries - from) : STRETCH;
        std::memcpy(here, score + from, count * sizeof(float));
        for (int i = 0; i < count; i += LANES) {
            const vec own = load(here + i);
            ivec rank = {};
            for (int k = 1; k < M; k++) {
                rank += (load(here + i + k) > own) & after[k];
                rank += ~(own > load(here + i - k)) & before[k];
            }
            int32_t ranks[LANES];
            uint8_t kept[LANES];
            std::memcpy(ranks, &rank, sizeof rank);
            for (int l = 0; l < LANES; l++) kept[l] = ranks[l] < n;
            if (count - i >= LANES) std::memcpy(keep + from + i, kept, LANES);
            else std::memcpy(keep + from + i, kept, count - i);
        }
    }
}

}  // namespace

extern "C" void sparsight_keep_largest(const float* score, int64_t rows, int64_t columns, int64_t count, uint8_t* keep,
                                       int threads) {
    threads = int(std::min<int64_t>({threads, rows, 1 + rows * columns / (2 * CHUNK)}));
    in_parts(threads, [=](int first) {
        for (int64_t r = first; r < rows; r += threads) keep_row(score + r * columns, columns, count, keep + r * columns);
    });
}

// m is 2, 4 or 8
extern "C" void sparsight_keep_of_group(const float* score, int64_t groups, int n, int m, uint8_t* keep) {
    (m == 2 ? keep_groups<2> : m == 4 ? keep_groups<4> : keep_groups<8>)(score, groups * m, n, keep);
}
