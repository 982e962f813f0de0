// Sums of matrix products in one pass, on AMX tiles: out = gain (a1 w1 + a2 w2 + ...) + bias, summed in float32 and
// rounded to bfloat16 once. So a small update beside a large product is not lost to the rounding of either.
#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <omp.h>

#include "tiles.h"

namespace {

// a (rows, k) at `a_row`; w (columns, k) where turned, else (k, columns), at `w_row`; k: a multiple of 32
struct Part {
    i64 a, a_row, k, w, w_row, turned;
    const bf16* left() const { return (const bf16*)a; }
    const bf16* right() const { return (const bf16*)w; }
};

constexpr i64 PANEL = 32;           // columns at once
constexpr i64 SLAB = 640;             // of k at once: that much of a panel stays in the first cache
// Where more comes out than is summed over, a thread takes few rows at once (what comes out stays in the second cache)
// against as many panels as stay there; else more rows, against all panels. The numbers are the fastest of some tried.
constexpr i64 FEW_ROWS = 96, MORE_ROWS = 160, GROUP_BYTES = 1 << 20;

// columns first ... first + PANEL of all parts' w, in pairs of k: [sum of k / 2][PANEL][2]
void pack(const Part* parts, i64 count, i64 columns, i64 first, uint32_t* to) {
    const i64 here = columns - first < PANEL ? columns - first : PANEL;
    alignas(64) uint32_t few[16 * 16];
    for (i64 p = 0; p < count; p++) {
        const Part& part = parts[p];
        if (part.turned) {
            const i64 row = part.w_row / 2;
            for (i64 j = 0; j < PANEL; j += 16) {
                const uint32_t* from = (const uint32_t*)part.right() + (first + j) * row;
                const bool whole = j + 16 <= here;
                for (i64 k = 0; k < part.k / 2; k += 16) {
                    if (whole) {
                        turn_16(from + k, row, to + k * PANEL + j, PANEL);
                        continue;
                    }
                    std::memset(few, 0, sizeof few);
                    for (i64 i = 0; j + i < here; i++) std::memcpy(few + 16 * i, from + i * row + k, 64);
                    turn_16(few, 16, to + k * PANEL + j, PANEL);
                }
            }
        } else {
            for (i64 k = 0; k < part.k; k += 2) {
                const bf16 *even = part.right() + k * part.w_row + first, *odd = even + part.w_row;
                uint32_t* pair = to + k / 2 * PANEL;
#pragma omp simd
                for (i64 j = 0; j < here; j++) pair[j] = uint32_t(even[j].bits) | uint32_t(odd[j].bits) << 16;
                for (i64 j = here; j < PANEL; j++) pair[j] = 0;
            }
        }
        to += part.k / 2 * PANEL;
    }
}

// rows first ... last of all parts' a, in blocks of (32, 32) one after another: [rows / 32][sum of k / 32][32][32]
void gather(const Part* parts, i64 count, i64 first, i64 last, i64 depth, bf16* to) {
    for (i64 row = first; row < last; row += 32, to += 32 * depth) {
        const i64 here = last - row < 32 ? last - row : 32;
        bf16* at = to;
        for (i64 p = 0; p < count; p++)
            for (i64 k = 0; k < parts[p].k; k += 32, at += 32 * 32) {
                const bf16* from = parts[p].left() + row * parts[p].a_row + k;
                for (i64 i = 0; i < here; i++) std::memcpy((void*)(at + 32 * i), from + i * parts[p].a_row, 64);
                if (here < 32) std::memset((void*)(at + 32 * here), 0, (32 - here) * 64);
            }
    }
}

// 32 rows by PANEL columns: the sums over `depth` of k, or what they add to. row, step: elements from one row of a to
// the next, and from 32 of k to the next. a passes by, the panel stays: hence loads that ask the cache not to keep a
static inline void block(const bf16* left, i64 row, i64 step, const uint32_t* panel, i64 depth, bool more, float* sums) {
    if (more) {
        _tile_loadd(0, sums, PANEL * 4);
        _tile_loadd(1, sums + 16, PANEL * 4);
        _tile_loadd(2, sums + 16 * PANEL, PANEL * 4);
        _tile_loadd(3, sums + 16 * PANEL + 16, PANEL * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 k = 0; k < depth; k += 32, left += step, panel += 16 * PANEL) {
        _tile_stream_loadd(4, left, row * 2);
        _tile_loadd(6, panel, PANEL * 4);
        _tile_loadd(7, panel + 16, PANEL * 4);
        _tile_stream_loadd(5, left + 16 * row, row * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + 16, PANEL * 4);
    _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
    _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
}

// gain (sums) + bias, rounded into here x wide of out
static inline void finish(const float* sums, i64 here, i64 wide, const bf16* bias, const float* gain, bf16* out, i64 out_row) {
    for (i64 i = 0; i < here; i++) {
        for (i64 j = 0; j < wide; j += 16) {
            const __mmask16 inside = wide - j < 16 ? __mmask16((1u << (wide - j)) - 1) : __mmask16(0xffff);
            __m512 value = _mm512_loadu_ps(sums + i * PANEL + j);
            if (gain) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(inside, gain + j));
            if (bias) {
                const __m512i wide_bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, bias + j));
                value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(wide_bias, 16)));
            }
            _mm256_mask_storeu_epi16(out + i * out_row + j, inside, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

}  // namespace

extern "C" {

// rows that a thread takes at once
i64 chunk_of(i64 rows, i64 columns, i64 depth, int threads) {
    const i64 fair = up_to((rows + threads - 1) / threads, 32), most = columns > depth ? FEW_ROWS : MORE_ROWS;
    return most < fair ? most : fair < 32 ? 32 : fair;
}

// bytes: all of w in panels; each thread's chunk of all a, and its sums
i64 ftrun_linear_scratch(i64 rows, i64 columns, i64 depth, int threads) {
    const i64 chunk = chunk_of(rows, columns, depth, threads);
    return (up_to(columns, PANEL) + threads * chunk) * depth * 2 + threads * chunk * PANEL * 4;
}

// out (rows, columns) bfloat16. depth: the sum of all k
void ftrun_linear(i64 rows, i64 columns, i64 count, const i64* table, i64 depth, const void* bias, const float* gain,
                  void* out, char* scratch, int threads) {
    const Part* parts = (const Part*)table;
    const i64 panels = (columns + PANEL - 1) / PANEL, words = depth / 2 * PANEL, chunk = chunk_of(rows, columns, depth, threads);
    const i64 chunks_in_all = (rows + chunk - 1) / chunk, size = panels * words * 4;
    const i64 groups = columns > depth && size > GROUP_BYTES ? (size + GROUP_BYTES - 1) / GROUP_BYTES : 1;
    uint32_t* packed = (uint32_t*)scratch;
    bf16* chunks = (bf16*)(packed + panels * words);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* own = chunks + omp_get_thread_num() * chunk * depth;
        float* sums = (float*)(chunks + threads * chunk * depth) + omp_get_thread_num() * chunk * PANEL;
#pragma omp for schedule(static)
        for (i64 p = 0; p < panels; p++) pack(parts, count, columns, p * PANEL, packed + p * words);
        // a thread's tasks follow one another: chunk after chunk against the same panels
#pragma omp for schedule(static)
        for (i64 task = 0; task < groups * chunks_in_all; task++) {
            const i64 first = task % chunks_in_all * chunk, last = first + chunk < rows ? first + chunk : rows;
            const i64 low = task / chunks_in_all * panels / groups, high = (task / chunks_in_all + 1) * panels / groups;
            // a few panels do not repay a copy of a, but for rows that are not there
            const bool as_it_is = count == 1 && panels <= 3 && (last - first) % 32 == 0;
            if (!as_it_is) gather(parts, count, first, last, depth, own);
            const bf16* left = as_it_is ? parts[0].left() + first * parts[0].a_row : own;
            const i64 a_row = as_it_is ? parts[0].a_row : 32, block_row = as_it_is ? a_row : depth;
            for (i64 p = low; p < high; p++) {
                const i64 wide = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
                const bf16* at_bias = bias ? (const bf16*)bias + p * PANEL : nullptr;
                const float* at_gain = gain ? gain + p * PANEL : nullptr;
                for (i64 k = 0; k < depth; k += SLAB)
                    for (i64 row = first; row < last; row += 32)
                        block(left + (row - first) * block_row + (as_it_is ? k : 32 * k), a_row, as_it_is ? 32 : 32 * 32,
                              packed + p * words + k / 2 * PANEL, depth - k < SLAB ? depth - k : SLAB, k > 0,
                              sums + (row - first) * PANEL);
                for (i64 row = first; row < last; row += 32) {
                    finish(sums + (row - first) * PANEL, last - row < 32 ? last - row : 32, wide, at_bias, at_gain,
                           (bf16*)out + row * columns + p * PANEL, columns);
                }
            }
        }
    }
}
}
#endif
