// Causal attention confined to each row of a packed sequence, forward and backward, in bfloat16 on AMX tiles.
//
// FlashAttention's arithmetic (Dao et al. 2022): the forward pass keeps the rows' log-sum-exp, the backward pass makes
// the weights again from it. The backward pass works on turned scores, keys down and queries across, so that no weight
// is ever turned over: dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T.
#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace {

constexpr i64 BLOCK = 32;   // queries, or keys, at once
constexpr i64 CHUNK = 128;  // of the other kind, against them: their scores stay in the first cache

// head h of token t begins at data + t * token + h * head; D numbers follow
struct View {
    const bf16* data;
    i64 token, head;
    const bf16* at(i64 t, i64 h) const { return data + t * token + h * head; }
};

struct Sizes {
    i64 rows, heads, groups, width;  // groups: query heads that share one of keys and values
    const i64* starts;               // rows + 1: where each row begins
    float scale;
    i64 window;  // keys that a query sees, itself counted
    i64 length(i64 row) const { return starts[row + 1] - starts[row]; }
    i64 padded_width() const { return up_to(width, 32); }
};

static inline bf16* take(char*& at, i64 count) {
    bf16* found = (bf16*)at;
    at += up_to(count * 2, 64);
    return found;
}

static inline float* take_floats(char*& at, i64 count) {
    float* found = (float*)at;
    at += up_to(count * 4, 64);
    return found;
}

static inline __m512 exp_512(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x);  // the second where one is no number: it stays none
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718056f), x);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(8.3334519073e-3f), r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline void store_bf16(bf16* to, __m512 value) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
}

// queries first ... first + BLOCK of one head: scores (BLOCK, keys) -> weights, their sums and log-sum-exp
static void weigh(float* scores, i64 lds, bf16* weights, i64 first, i64 n, i64 from, i64 to, float scale, i64 window,
                  float* sums, float* lse) {
    const __m512 by = _mm512_set1_ps(scale);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (i64 i = 0; i < BLOCK; i++) {
        const i64 query = first + i;
        float* row = scores + i * lds;
        bf16* out = weights + i * lds;
        if (query >= n) {
            std::memset((void*)out, 0, (to - from) * 2);
            continue;
        }
        const i64 oldest = query - window + 1;
        const auto seen = [&](i64 key) {
            const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(int(key)));
            return _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(int(query))) &
                   _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(int(oldest)));
        };
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (i64 key = from; key <= query; key += 16)
            most = _mm512_mask_max_ps(most, seen(key), most, _mm512_loadu_ps(row + key - from));
        const float largest = _mm512_reduce_max_ps(most) * scale;
        const __m512 top = _mm512_set1_ps(largest);
        __m512 total = _mm512_setzero_ps();
        i64 key = from;
        for (; key <= query; key += 16) {
            const __m512 e = _mm512_maskz_mov_ps(seen(key), exp_512(_mm512_fmsub_ps(_mm512_loadu_ps(row + key - from), by, top)));
            total = _mm512_add_ps(total, e);
            store_bf16(out + key - from, e);
        }
        if (key < to) std::memset((void*)(out + key - from), 0, (to - key) * 2);
        sums[i] = _mm512_reduce_add_ps(total);
        lse[query] = std::log(sums[i]) + largest;
    }
}

// turned scores (BLOCK keys, queries) and their gradients -> P^T and dS^T, the latter also in pairs of keys
static void weigh_back(const float* scores, const float* slopes, i64 lds, i64 first, i64 n, i64 from, i64 to, float scale,
                       i64 window, const float* lse, const float* delta, bf16* weights, bf16* dscores, bf16* paired) {
    const __m512 by = _mm512_set1_ps(scale);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i last = _mm512_set1_epi32(int(n));
    for (i64 i = 0; i < BLOCK; i += 2) {
        for (i64 query = from; query < to; query += 16) {
            const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(int(query)));
            const __mmask16 real = _mm512_cmplt_epi32_mask(at, last);
            const __m512 l = _mm512_loadu_ps(lse + query), d = _mm512_loadu_ps(delta + query);
            __m256i both[2];
            for (int k = 0; k < 2; k++) {
                const i64 key = first + i + k, place = (i + k) * lds + query - from;
                const __mmask16 seen = real & _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(int(key))) &
                                       _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(int(key + window)));
                const __m512 p = _mm512_maskz_mov_ps(seen, exp_512(_mm512_fmsub_ps(_mm512_loadu_ps(scores + place), by, l)));
                const __m512 s = _mm512_maskz_mul_ps(seen, p, _mm512_sub_ps(_mm512_loadu_ps(slopes + place), d));
                store_bf16(weights + place, p);
                both[k] = (__m256i)_mm512_cvtneps_pbh(s);
                _mm256_storeu_si256((__m256i*)(dscores + place), both[k]);
            }
            const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(both[0]), _mm512_slli_epi32(_mm512_cvtepu16_epi32(both[1]), 16));
            _mm512_storeu_si512((uint32_t*)paired + i / 2 * lds + query - from, pairs);
        }
    }
}

i64 forward_scratch(i64 n, i64 D) {
    const i64 N = up_to(n, BLOCK);
    return 3 * up_to(N * D * 2, 64) + up_to(BLOCK * D * 2, 64) + up_to(BLOCK * N * 4, 64) + up_to(BLOCK * N * 2, 64) +
           up_to(BLOCK * D * 4, 64) + 64;
}

// one head of one row
void forward(const Sizes& z, View q, View k, View v, bf16* out, float* lse, i64 tokens, i64 row, i64 head, char* at) {
    const i64 n = z.length(row), N = up_to(n, BLOCK), d = z.width, D = z.padded_width(), start = z.starts[row];
    bf16 *rows = take(at, N * D), *keys = take(at, N * D), *values = take(at, N * D), *query = take(at, BLOCK * D);
    float* scores = take_floats(at, BLOCK * N);
    bf16* weights = take(at, BLOCK * N);
    float *summed = take_floats(at, BLOCK * D), sums[BLOCK];
    pad_rows(k.at(start, head / z.groups), k.token, n, d, N, D, rows);
    pair_columns(rows, N, D, keys);
    pad_rows(v.at(start, head / z.groups), v.token, n, d, N, D, rows);
    pair_rows(rows, N, D, values);
    for (i64 first = 0; first < N; first += BLOCK) {
        const i64 to = first + BLOCK, least = first - z.window + 1, from = least > 0 ? least / BLOCK * BLOCK : 0;
        const i64 here = n - first < BLOCK ? n - first : BLOCK;
        pad_rows(q.at(start + first, head), q.token, here, d, BLOCK, D, query);
        product<false>(BLOCK, to - from, D, query, D, keys + 2 * from, N, scores, N);
        weigh(scores, N, weights, first, n, from, to, z.scale, z.window, sums, lse + head * tokens + start);
        product<false>(BLOCK, D, to - from, weights, N, values + from * D, D, summed, D);
        for (i64 i = 0; i < here; i++) {
            const float each = 1.0f / sums[i];
            bf16* into = out + ((start + first + i) * z.heads + head) * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) put(into[j], summed[i * D + j] * each);
        }
    }
}

i64 backward_scratch(i64 n, i64 D) {
    const i64 N = up_to(n, BLOCK);
    return 8 * up_to(N * D * 2, 64) + 2 * up_to(BLOCK * (CHUNK > D ? CHUNK : D) * 4, 64) + 3 * up_to(BLOCK * CHUNK * 2, 64) +
           up_to(N * D * 4, 64) + 2 * up_to(BLOCK * D * 4, 64) + 2 * up_to(N * 4, 64) + 64;
}

// one head of one row; dk and dv (tokens, heads, width), a query head's own share each: float32 where groups > 1
template <typename Out>
void backward(const Sizes& z, View q, View k, View v, View out, View grad, const float* lse, bf16* dq, Out* dk, Out* dv,
              i64 tokens, i64 row, i64 head, char* at) {
    const i64 n = z.length(row), N = up_to(n, BLOCK), d = z.width, D = z.padded_width(), start = z.starts[row];
    bf16 *queries = take(at, N * D), *grads = take(at, N * D), *keys = take(at, N * D), *values = take(at, N * D);
    bf16 *queries_t = take(at, N * D), *grads_t = take(at, N * D), *keys_t = take(at, N * D), *rows = take(at, N * D);
    const i64 wide = BLOCK * (CHUNK > D ? CHUNK : D);
    float *scores = take_floats(at, wide), *slopes = take_floats(at, wide);
    bf16 *weights = take(at, BLOCK * CHUNK), *dscores = take(at, BLOCK * CHUNK), *paired = take(at, BLOCK * CHUNK);
    float *dq_t = take_floats(at, N * D), *key_grad = take_floats(at, BLOCK * D), *value_grad = take_floats(at, BLOCK * D);
    float *delta = take_floats(at, N), *own_lse = take_floats(at, N);

    pad_rows(q.at(start, head), q.token, n, d, N, D, rows);
    pair_columns(rows, N, D, queries_t);
    pair_rows(rows, N, D, queries);
    pad_rows(grad.at(start, head), grad.token, n, d, N, D, rows);
    pair_columns(rows, N, D, grads_t);
    pair_rows(rows, N, D, grads);
    pad_rows(k.at(start, head / z.groups), k.token, n, d, N, D, keys);
    turn(keys, N, D, rows, keys_t);
    pad_rows(v.at(start, head / z.groups), v.token, n, d, N, D, values);
    std::memset(dq_t, 0, N * D * 4);
    for (i64 i = 0; i < N; i++) {
        float sum = 0;
        if (i < n) {
            const bf16 *o = out.at(start + i, head), *g = grad.at(start + i, head);
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < d; j++) sum += get(o[j]) * get(g[j]);
        }
        delta[i] = sum;
        own_lse[i] = i < n ? lse[head * tokens + start + i] : 0;
    }

    for (i64 first = 0; first < N; first += BLOCK) {
        const i64 last = first + BLOCK - 1 + z.window, to = last < N ? up_to(last, BLOCK) : N;
        std::memset(value_grad, 0, BLOCK * D * 4);
        std::memset(key_grad, 0, BLOCK * D * 4);
        for (i64 from = first; from < to; from += CHUNK) {
            const i64 end = from + CHUNK < to ? from + CHUNK : to, count = end - from;
            product<false>(BLOCK, count, D, keys + first * D, D, queries_t + 2 * from, N, scores, CHUNK);
            product<false>(BLOCK, count, D, values + first * D, D, grads_t + 2 * from, N, slopes, CHUNK);
            weigh_back(scores, slopes, CHUNK, first, n, from, end, z.scale, z.window, own_lse, delta, weights, dscores,
                       paired);
            product<true>(BLOCK, D, count, weights, CHUNK, grads + from * D, D, value_grad, D);
            product<true>(BLOCK, D, count, dscores, CHUNK, queries + from * D, D, key_grad, D);
            product<true>(D, count, BLOCK, keys_t + first, N, paired, CHUNK, dq_t + from, N);
        }
        for (i64 i = 0; i < BLOCK && first + i < n; i++) {
            const i64 place = ((start + first + i) * z.heads + head) * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) {
                put(dk[place + j], key_grad[i * D + j] * z.scale);
                put(dv[place + j], value_grad[i * D + j]);
            }
        }
    }
    float* turned = scores;  // (16, D): done with
    for (i64 i = 0; i < n; i += 16) {
        for (i64 j = 0; j < D; j += 16) turn_16((const uint32_t*)dq_t + j * N + i, N, (uint32_t*)turned + j, D);
        for (i64 r = 0; r < 16 && i + r < n; r++) {
            bf16* into = dq + ((start + i + r) * z.heads + head) * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) put(into[j], turned[r * D + j] * z.scale);
        }
    }
}

// shares (tokens, heads, width) of query heads summed to their keys' (tokens, heads / groups, width)
void gather(i64 tokens, i64 heads, i64 groups, i64 width, const float* shares, bf16* sums, int threads) {
    const i64 count = tokens * (heads / groups);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < count; i++) {
        const float* from = shares + i * groups * width;
        for (i64 j = 0; j < width; j++) {
            float sum = 0;
            for (i64 g = 0; g < groups; g++) sum += from[g * width + j];
            put(sums[i * width + j], sum);
        }
    }
}

}  // namespace

extern "C" {

// whether this machine lets the process use the tiles
int ftrun_tiles_work() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// bytes that one thread needs
i64 ftrun_attention_scratch(i64 longest, i64 width, int back) {
    const i64 D = up_to(width, 32);
    return back ? backward_scratch(longest, D) : forward_scratch(longest, D);
}

void ftrun_attention(i64 rows, const i64* starts, i64 heads, i64 groups, i64 width, float scale, i64 window,
                     const void* q, i64 q_token, i64 q_head, const void* k, i64 k_token, i64 k_head, const void* v,
                     i64 v_token, i64 v_head, void* out, float* lse, char* scratch, i64 each, int threads) {
    const Sizes z{rows, heads, groups, width, starts, scale, window};
    const View Q{(const bf16*)q, q_token, q_head}, K{(const bf16*)k, k_token, k_head}, V{(const bf16*)v, v_token, v_head};
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        char* own = scratch + each * omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < rows * heads; task++)
            forward(z, Q, K, V, (bf16*)out, lse, starts[rows], task / heads, task % heads, own);
    }
}

// shares: 2 * tokens * heads * width floats where groups > 1
void ftrun_attention_backward(i64 rows, const i64* starts, i64 heads, i64 groups, i64 width, float scale, i64 window,
                              const void* q, i64 q_token, i64 q_head, const void* k, i64 k_token, i64 k_head,
                              const void* v, i64 v_token, i64 v_head, const void* out, const void* grad,
                              const float* lse, void* dq, void* dk, void* dv, float* shares, char* scratch, i64 each,
                              int threads) {
    const Sizes z{rows, heads, groups, width, starts, scale, window};
    const i64 tokens = starts[rows];
    const View Q{(const bf16*)q, q_token, q_head}, K{(const bf16*)k, k_token, k_head}, V{(const bf16*)v, v_token, v_head};
    const View O{(const bf16*)out, heads * width, width}, G{(const bf16*)grad, heads * width, width};
    float* more = shares + tokens * heads * width;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        char* own = scratch + each * omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < rows * heads; task++) {
            const i64 row = task / heads, head = task % heads;
            if (groups > 1) backward(z, Q, K, V, O, G, lse, (bf16*)dq, shares, more, tokens, row, head, own);
            else backward(z, Q, K, V, O, G, lse, (bf16*)dq, (bf16*)dk, (bf16*)dv, tokens, row, head, own);
        }
    }
    if (groups > 1) {
        gather(tokens, heads, groups, width, shares, (bf16*)dk, threads);
        gather(tokens, heads, groups, width, more, (bf16*)dv, threads);
    }
}
}
#else
extern "C" int ftrun_tiles_work() { return 0; }
#endif
