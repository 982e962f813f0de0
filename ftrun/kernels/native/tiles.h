// Matrix products of small blocks on Intel's AMX tiles: float32 sums of bfloat16 products, as oneDNN has them.
// Sizes are multiples of 32. The right factor lies in pairs: [k / 2][columns][2].
#pragma once
#include <immintrin.h>

#include "common.h"

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// a thread's tiles, for as long as it lives: eight of 16 rows of 64 bytes
struct Tiles {
    Tiles() {
        TileShapes shapes;
        for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// c (m, n) = a (m, k) b (k, n), or added to c. lda, ldc in elements; ldb in columns of b's pairs
template <bool ADD>
static inline void product(i64 m, i64 n, i64 k, const bf16* a, i64 lda, const bf16* b, i64 ldb, float* c, i64 ldc) {
    for (i64 i = 0; i < m; i += 32) {
        for (i64 j = 0; j < n; j += 32) {
            float* to = c + i * ldc + j;
            if (ADD) {
                _tile_loadd(0, to, ldc * 4);
                _tile_loadd(1, to + 16, ldc * 4);
                _tile_loadd(2, to + 16 * ldc, ldc * 4);
                _tile_loadd(3, to + 16 * ldc + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (i64 p = 0; p < k; p += 32) {
                const bf16 *left = a + i * lda + p, *right = b + p * ldb + 2 * j;
                _tile_loadd(4, left, lda * 2);
                _tile_loadd(6, right, ldb * 4);
                _tile_loadd(7, right + 32, ldb * 4);
                _tile_loadd(5, left + 16 * lda, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, ldc * 4);
            _tile_stored(1, to + 16, ldc * 4);
            _tile_stored(2, to + 16 * ldc, ldc * 4);
            _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
        }
    }
}

static inline i64 up_to(i64 n, i64 step) { return (n + step - 1) / step * step; }

// rows (n, d) at `stride` -> (N, D), zeros beyond
static inline void pad_rows(const bf16* from, i64 stride, i64 n, i64 d, i64 N, i64 D, bf16* to) {
    for (i64 i = 0; i < N; i++) {
        if (i < n) std::memcpy((void*)(to + i * D), from + i * stride, d * 2);
        const i64 known = i < n ? d : 0;
        std::memset((void*)(to + i * D + known), 0, (D - known) * 2);
    }
}

// rows (N, D), padded -> in pairs of rows: [N / 2][D][2]
static inline void pair_rows(const bf16* from, i64 N, i64 D, bf16* to) {
    uint32_t* out = (uint32_t*)to;
    for (i64 i = 0; i < N; i += 2) {
        const bf16 *even = from + i * D, *odd = even + D;
#pragma omp simd
        for (i64 j = 0; j < D; j++) out[i / 2 * D + j] = uint32_t(even[j].bits) | uint32_t(odd[j].bits) << 16;
    }
}

// (16, 16) of 32 bits, turned over
static inline void turn_16(const uint32_t* from, i64 ldf, uint32_t* to, i64 ldt) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * ldf);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * ldt, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 4) * ldt, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ldt, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 12) * ldt, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

// rows (N, D), padded -> turned over, in pairs: [D / 2][N][2]
static inline void pair_columns(const bf16* from, i64 N, i64 D, bf16* to) {
    for (i64 i = 0; i < N; i += 16)
        for (i64 j = 0; j < D / 2; j += 16)
            turn_16((const uint32_t*)from + i * (D / 2) + j, D / 2, (uint32_t*)to + j * N + i, N);
}

// rows (N, D), padded -> (D, N); through `pairs`, room for as many
static inline void turn(const bf16* from, i64 N, i64 D, bf16* pairs, bf16* to) {
    pair_columns(from, N, D, pairs);
    const uint32_t* words = (const uint32_t*)pairs;
    for (i64 j = 0; j < D / 2; j++) {
        bf16 *even = to + 2 * j * N, *odd = even + N;
#pragma omp simd
        for (i64 i = 0; i < N; i++) {
            even[i].bits = uint16_t(words[j * N + i]);
            odd[i].bits = uint16_t(words[j * N + i] >> 16);
        }
    }
}
