// The best one-swaps of every row, as prune/methods/swaps.py describes them. Rows are independent.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace {

struct Swap {
    float change = 0;
    long out = -1, back = -1;
};

inline float change_of(const float *w, const float *c, const float *G, long n, long p, long q) {
    return 2 * w[p] * c[p] + w[p] * w[p] * G[p * n + p] - 2 * w[q] * c[q] + w[q] * w[q] * G[q * n + q] -
           2 * w[p] * w[q] * G[p * n + q];
}

// Pairs in the order of the bound 2 (w_p c_p - w_q c_q) + (a_p - a_q)^2, a_j = |w_j| sqrt(G_jj): none lies below it.
Swap best_of_row(const float *w, const uint8_t *keep, const float *c, const float *G, const float *root, long n,
                 std::vector<long> &kept, std::vector<long> &pruned) {
    kept.clear();
    pruned.clear();
    for (long j = 0; j < n; ++j)
        if (keep[j] || w[j] != 0) (keep[j] ? kept : pruned).push_back(j);  // a weight that is zero cannot come back
    std::sort(kept.begin(), kept.end(), [&](long a, long b) { return w[a] * c[a] < w[b] * c[b]; });
    std::sort(pruned.begin(), pruned.end(), [&](long a, long b) { return w[a] * c[a] > w[b] * c[b]; });
    Swap best;
    for (long p : kept) {
        const float u = w[p] * c[p], a = std::fabs(w[p]) * root[p];
        for (long q : pruned) {
            const float bound = 2 * (u - w[q] * c[q]);
            if (bound >= best.change) break;
            const float gap = a - std::fabs(w[q]) * root[q];
            if (bound + gap * gap >= best.change) continue;
            const float change = change_of(w, c, G, n, p, q);
            if (change < best.change) best = {change, p, q};
        }
    }
    return best;
}

Swap best_of_groups(const float *w, const uint8_t *keep, const float *c, const float *G, long n, long m) {
    Swap best;
    for (long start = 0; start < n; start += m)
        for (long p = start; p < start + m; ++p)
            for (long q = start; keep[p] && q < start + m; ++q) {
                if (keep[q] || w[q] == 0) continue;
                const float change = change_of(w, c, G, n, p, q);
                if (change < best.change) best = {change, p, q};
            }
    return best;
}

}  // namespace

// W, c (rows, n), G (n, n), floor (rows): float32; keep (rows, n): 0 or 1, changed in place, as is c. m: 0, or of n:m.
extern "C" void sparsight_swap_rows(const float *W, uint8_t *keep, const float *G, float *c, const float *floor,
                                    int64_t rows, int64_t n, int64_t m, int64_t cycles, int threads) {
    std::vector<float> root(n);
    for (long j = 0; j < n; ++j) root[j] = std::sqrt(std::max(0.0f, G[j * n + j]));
    std::atomic<int64_t> next{0};
    in_parts(int(std::min<int64_t>(threads, rows)), [&](int) {
        std::vector<long> kept, pruned;
        for (int64_t row; (row = next++) < rows;) {
            const float *w = W + row * n;
            uint8_t *mask = keep + row * n;
            float *now = c + row * n;
            for (int64_t cycle = 0; cycle < cycles; ++cycle) {
                const Swap best = m ? best_of_groups(w, mask, now, G, n, m)
                                    : best_of_row(w, mask, now, G, root.data(), n, kept, pruned);
                if (!(best.change < -floor[row]) || best.out < 0) break;
                mask[best.out] = 0;
                mask[best.back] = 1;
                const float wp = w[best.out], wq = w[best.back];
                const float *Gp = G + best.out * n, *Gq = G + best.back * n;
                for (int64_t j = 0; j < n; ++j) now[j] += wp * Gp[j] - wq * Gq[j];
            }
        }
    });
}
