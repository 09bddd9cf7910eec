// Matrix tiles (Intel AMX): eight registers of sixteen rows of 64 bytes, and one instruction that multiplies two of them.
//
// A thread has one configuration, and the kernel grants a process the registers only if it asks.

#pragma once

#include "packed.h"

#if defined(SPARSIGHT_AVX512) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define SPARSIGHT_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int HIGH = 16;                   // rows of a tile; tokens of one, at most
constexpr int64_t TILE = 64 * HIGH;        // bytes of a tile

// The compiler does not know that instructions on tiles read and write memory: what is before stays before.
inline void ordered() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 inputs of `tokens` tokens. What the thread had before comes back: another
// library may rely on its own configuration.
class TileUse {
    struct alignas(64) Palette {
        uint8_t number = 1, start = 0, unused[14] = {};
        uint16_t bytes[HIGH] = {};
        uint8_t rows[HIGH] = {};
    } before_;

  public:
    explicit TileUse(int tokens) {
        Palette own;
        for (int i = 0; i < 8; i++) {
            own.bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * tokens);
            own.rows[i] = HIGH;
        }
        ordered();  // what is written so far comes before: the compiler knows of eight bytes of a configuration
        _tile_storeconfig(&before_);
        ordered();
        _tile_loadconfig(&own);
    }
    ~TileUse() {
        if (before_.number) _tile_loadconfig(&before_);
        else _tile_release();
    }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

inline bool may_use_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return granted;
}

}  // namespace

#endif
