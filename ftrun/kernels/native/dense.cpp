// 4-bit blocks made dense, and DoRA's W A^T from bfloat16 W and float32 A.
#include <omp.h>

#include "common.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// count values, two to a byte, the first in the high half; a block of them shares a constant
template <typename T>
void dequantise(i64 first, i64 last, const uint8_t* packed, const float* constants, i64 block, const float* code, T* out) {
    for (i64 i = first; i < last; i += 2) {
        const uint8_t both = packed[i / 2];
        put(out[i], code[both >> 4] * constants[i / block]);
        put(out[i + 1], code[both & 15] * constants[(i + 1) / block]);
    }
}

#ifdef __AVX512F__
static inline __m512i nearest(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

// whole blocks of a multiple of 32 values
template <>
void dequantise(i64 first, i64 last, const uint8_t* packed, const float* constants, i64 block, const float* code, bf16* out) {
    const __m512 table = _mm512_loadu_ps(code);
    const __m512i low = _mm512_set1_epi32(15), upper = _mm512_set1_epi32(int(0xffff0000));
    for (i64 start = first; start < last; start += block) {
        const __m512 by = _mm512_set1_ps(constants[start / block]);
        for (i64 i = start; i < start + block; i += 32) {
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
            const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), by);
            const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_and_si512(bytes, low), table), by);
            const __m512i words = _mm512_or_si512(_mm512_srli_epi32(nearest(even), 16), _mm512_and_si512(nearest(odd), upper));
            _mm512_storeu_si512(out + i, words);
        }
    }
}
#endif

}  // namespace

extern "C" {

// count: a multiple of block; block: a multiple of 32
void ftrun_dequantise_4bit(int half, i64 count, const uint8_t* packed, const float* constants, i64 block,
                           const float* code, void* out, int threads) {
    const i64 piece = (1 << 16) / block * block > 0 ? (1 << 16) / block * block : block;
    const i64 pieces = (count + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 p = 0; p < pieces; p++) {
        const i64 first = p * piece, last = first + piece < count ? first + piece : count;
        if (half) dequantise(first, last, packed, constants, block, code, (bf16*)out);
        else dequantise(first, last, packed, constants, block, code, (float*)out);
    }
}
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "tiles.h"

// W A^T (rows, rank) float32 from W (rows, width) bfloat16 and A (rank, width) float32, as the sum of two products: A
// is its nearest bfloat16 and what that leaves. width: a multiple of 32. scratch: 4 * up_to(rank, 32) * width * 2 bytes,
// then per thread 32 * (width * 2 + up_to(rank, 32) * 4).
extern "C" void ftrun_cross(i64 rows, i64 width, i64 rank, const void* weight, const float* a, float* out, char* scratch,
                            int threads) {
    const i64 R = up_to(rank, 32), size = R * width;
    bf16 *part = (bf16*)scratch, *rest = part + size, *paired = rest + size, *paired_rest = paired + size;
    std::memset((void*)part, 0, 2 * size * sizeof(bf16));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rank * width; i++) {
        put(part[i], a[i]);
        put(rest[i], a[i] - get(part[i]));
    }
    pair_columns(part, R, width, paired);
    pair_columns(rest, R, width, paired_rest);
    char* own = (char*)(paired_rest + size);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float* sums = (float*)(own + omp_get_thread_num() * 32 * (width * 2 + R * 4));
        bf16* last = (bf16*)(sums + 32 * R);
#pragma omp for schedule(static)
        for (i64 first = 0; first < rows; first += 32) {
            const i64 here = rows - first < 32 ? rows - first : 32;
            const bf16* block = (const bf16*)weight + first * width;
            if (here < 32) {
                pad_rows(block, width, here, width, 32, width, last);
                block = last;
            }
            product<false>(32, R, width, block, width, paired, R, sums, R);
            product<true>(32, R, width, block, width, paired_rest, R, sums, R);
            for (i64 i = 0; i < here; i++) std::memcpy(out + (first + i) * rank, sums + i * R, rank * 4);
        }
    }
}
#endif
