// Packs, expands and multiplies small matrices and prints the bits of every result, so that machines can be compared.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cstdint>
#include <cstring>
#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif
extern "C" int sparsight_product(const void*, int, const uint8_t*, const int64_t*, int64_t, int64_t, const void*, int64_t,
                                 const void*, void*, int);
extern "C" int sparsight_product_int8(const void*, const float*, int, const uint8_t*, const int64_t*, int64_t, int64_t,
                                      const void*, int64_t, const void*, void*, int);
extern "C" int sparsight_product_tiles(const void*, const float*, const uint8_t*, const int64_t*, int64_t, int64_t,
                                       const void*, int64_t, const void*, void*, int);
extern "C" int sparsight_offsets(const uint8_t*, int64_t, int64_t, int64_t*);
extern "C" int sparsight_pack_rows(const void*, int, int64_t, int64_t, uint8_t*, void*, int64_t*);
extern "C" int sparsight_expand_rows(const void*, int, const uint8_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t,
                                     void*, int);

// Whether a thread that multiplies by tiles has its own configuration of tiles back afterwards.
template <class Product> bool keeps_its_configuration(const Product& product) {
#if defined(__AMX_TILE__)
    alignas(64) uint8_t own[64] = {1}, after[64] = {};
    for (int i = 0; i < 3; i++) own[16 + 2 * i] = uint8_t(8 + 4 * i), own[48 + i] = uint8_t(3 + i);
    __asm__ volatile("" : : "r"(own), "r"(after) : "memory");
    _tile_loadconfig(own);
    product();
    _tile_storeconfig(after);
    __asm__ volatile("" : : "r"(own), "r"(after) : "memory");
    _tile_release();
    return !std::memcmp(own, after, sizeof own);
#else
    return product(), true;
#endif
}

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }
int main() {
    for (int type = 0; type < 4; type++)  // 3: int8 with inputs of float32
        for (int64_t columns : {1, 7, 64, 100, 513})
            for (int64_t tokens : {1, 3, 8, 40, 70}) {
                const int64_t rows = 13;
                const int size = type == 0 ? 4 : type == 3 ? 1 : 2, in = type == 3 ? 4 : size;
                std::vector<uint8_t> W(rows * columns * size + 64), x(tokens * columns * in), bits(rows * ((columns + 7) / 8));
                std::vector<uint8_t> values(rows * columns * size + 64), out(tokens * rows * in), back(rows * columns * size);
                std::vector<float> scale(rows, 0.125f);
                const auto number = [&](uint8_t* to, int kind) {
                    const float v = float(int32_t(next() >> 16) - 32768) / 8192;
                    uint32_t b;
                    std::memcpy(&b, &v, 4);
                    const uint16_t brain = uint16_t(b >> 16), half = uint16_t((next() >> 17 & 0x83ff) | 0x3c00);
                    const int8_t code = int8_t(next() >> 24);
                    std::memcpy(to, kind == 0 ? (void*)&v : kind == 1 ? (void*)&brain : kind == 2 ? (void*)&half : (void*)&code,
                                kind == 0 ? 4 : kind == 3 ? 1 : 2);
                };
                for (int64_t i = 0; i < rows * columns; i++)
                    if (next() >> 31) number(&W[i * size], type);
                for (int64_t i = 0; i < tokens * columns; i++) number(&x[i * in], type == 3 ? 0 : type);
                int64_t kept;
                sparsight_pack_rows(W.data(), size, rows, columns, bits.data(), values.data(), &kept);
                std::vector<int64_t> offset(rows + 1);
                sparsight_offsets(bits.data(), rows, (columns + 7) / 8, offset.data());
                std::vector<uint8_t> exact(values.begin(), values.begin() + kept * size);  // nothing may be read behind them
                sparsight_expand_rows(exact.data(), size, bits.data(), offset.data(), rows, columns, 0, rows, back.data(), 1);
                if (std::memcmp(back.data(), W.data(), back.size())) return 1;
                if (type == 3) sparsight_product_int8(exact.data(), scale.data(), 0, bits.data(), offset.data(), rows, columns,
                                                      x.data(), tokens, nullptr, out.data(), 1);
                else sparsight_product(exact.data(), type, bits.data(), offset.data(), rows, columns, x.data(), tokens, nullptr,
                                       out.data(), 1);
                if (type == 1) {  // matrix tiles add in another order, where there are some: they agree, and stay inside
                    std::vector<uint8_t> tiles(out.size());
                    const auto wide = [](const uint8_t* from) {
                        const uint32_t b = uint32_t(from[1]) << 24 | uint32_t(from[0]) << 16;
                        float v;
                        std::memcpy(&v, &b, 4);
                        return v;
                    };
                    const auto product = [&] {
                        return sparsight_product_tiles(exact.data(), nullptr, bits.data(), offset.data(), rows, columns, x.data(),
                                                       tokens, nullptr, tiles.data(), 1);
                    };
                    if (product()) {
                        for (size_t i = 0; i < out.size(); i += 2)  // a NaN is none of these
                            if (!(std::abs(wide(&tiles[i]) - wide(&out[i])) <= 0.02f * (1 + std::abs(wide(&out[i]))))) return 2;
                        sparsight_product_tiles(exact.data(), nullptr, bits.data(), offset.data(), rows, columns, x.data(), 0,
                                                nullptr, tiles.data(), 1);
                        if (!keeps_its_configuration(product)) return 3;
                    }
                }
                if (tokens <= 8) for (uint8_t byte : out) std::printf("%02x", byte);
                if (tokens <= 8) std::puts("");
            }
}
