// Elementwise kernels and row reductions: root mean square norm, gated activations, rotary positions, cross-entropy.
// Every sum and product is float32; what comes out is rounded where the plain code of the models rounds.
#include "common.h"

namespace {

// form 0: rounded after the norm and after the weight; 1: at the end; 2: so too, of a weight kept less 1
template <typename T>
void rms_norm(i64 rows, i64 width, const T* x, const T* weight, float eps, int form, T* y, float* rstd, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T* in = x + row * width;
        T* out = y + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < width; i++) sum += get(in[i]) * get(in[i]);
        const float scale = 1.0f / std::sqrt(sum / float(width) + eps);
        rstd[row] = scale;
        if (form == 0) {
#pragma omp simd
            for (i64 i = 0; i < width; i++) put(out[i], as<T>(get(in[i]) * scale) * get(weight[i]));
        } else {
            const float one = form == 2 ? 1.0f : 0.0f;
#pragma omp simd
            for (i64 i = 0; i < width; i++) put(out[i], get(in[i]) * scale * (one + get(weight[i])));
        }
    }
}

// dx = rstd (g - xhat mean(g xhat)), g = dy w, xhat = x rstd
template <typename T>
void rms_norm_backward(i64 rows, i64 width, const T* grad, const T* x, const T* weight, const float* rstd, bool plus_one,
                       T* dx, int threads) {
    const float one = plus_one ? 1.0f : 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T *in = x + row * width, *g = grad + row * width;
        T* out = dx + row * width;
        const float scale = rstd[row];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < width; i++) sum += get(g[i]) * (get(weight[i]) + one) * get(in[i]);
        const float along = sum * scale * scale / float(width);
#pragma omp simd
        for (i64 i = 0; i < width; i++) put(out[i], scale * (get(g[i]) * (get(weight[i]) + one) - get(in[i]) * along));
    }
}

struct Silu {
    static inline float value(float x) { return x / (1.0f + fast_exp(-x)); }
    static inline float slope(float x) {
        const float s = 1.0f / (1.0f + fast_exp(-x));
        return s * (1.0f + x * (1.0f - s));
    }
};

// the tanh form of gelu: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
    static inline float twice(float x) { return 1.5957691216057308f * (x + 0.044715f * x * x * x); }
    static inline float value(float x) { return x / (1.0f + fast_exp(-twice(x))); }
    static inline float slope(float x) {
        const float s = 1.0f / (1.0f + fast_exp(-twice(x)));
        return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    }
};

// gate and up may be the halves of one tensor: their rows begin `stride` elements apart
template <typename T, typename Act>
void gated(i64 rows, i64 width, i64 stride, const T* gate, const T* up, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T *g = gate + row * stride, *u = up + row * stride;
        T* o = out + row * width;
#pragma omp simd
        for (i64 i = 0; i < width; i++) put(o[i], as<T>(Act::value(get(g[i]))) * get(u[i]));
    }
}

template <typename T, typename Act>
void gated_backward(i64 rows, i64 width, i64 stride, const T* grad, const T* gate, const T* up, T* dgate, T* dup,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T *d = grad + row * width, *g = gate + row * stride, *u = up + row * stride;
        T *dg = dgate + row * stride, *du = dup + row * stride;
#pragma omp simd
        for (i64 i = 0; i < width; i++) {
            const float x = get(g[i]), y = get(u[i]), z = get(d[i]);
            put(dg[i], as<T>(z * y) * Act::slope(x));
            put(du[i], z * as<T>(Act::value(x)));
        }
    }
}

// Heads of `size` numbers, of which the first `turned` are turned in pairs (i, i + turned / 2) by the token's angles.
// turn -1 turns back (the transpose). x and out have strides in elements for tokens and heads.
template <typename T>
void rope(i64 tokens, i64 heads, i64 size, i64 turned, const T* x, i64 x_token, i64 x_head, const T* cosine,
          const T* sine, T* out, i64 out_token, i64 out_head, bool back, int threads) {
    const i64 half = turned / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 token = 0; token < tokens; token++) {
        const T *c = cosine + token * turned, *s = sine + token * turned;
        for (i64 head = 0; head < heads; head++) {
            const T* in = x + token * x_token + head * x_head;
            T* to = out + token * out_token + head * out_head;
            if (back) {
#pragma omp simd
                for (i64 i = 0; i < half; i++) {
                    const float a = get(in[i]), b = get(in[i + half]);
                    put(to[i], a * get(c[i]) + b * get(s[i + half]));
                    put(to[i + half], b * get(c[i + half]) - a * get(s[i]));
                }
            } else {
#pragma omp simd
                for (i64 i = 0; i < half; i++) {
                    const float a = get(in[i]), b = get(in[i + half]);
                    put(to[i], a * get(c[i]) - b * get(s[i]));
                    put(to[i + half], b * get(c[i + half]) + a * get(s[i + half]));
                }
            }
            for (i64 i = turned; i < size; i++) to[i] = in[i];
        }
    }
}

// Each row's loss, and in the logits' own memory its gradient; target -100 means none.
// The shaped logit is cap tanh(scale l / cap) (cap 0: scale l).
template <typename T>
void cross_entropy(i64 rows, i64 vocabulary, T* logits, const i64* targets, float scale, float cap, bool gradient,
                   float* losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        T* l = logits + row * vocabulary;
        const i64 target = targets[row];
        if (target < 0) {
            losses[row] = 0;
            if (gradient) std::memset(static_cast<void*>(l), 0, sizeof(T) * vocabulary);
            continue;
        }
        if (cap > 0) {
#pragma omp simd
            for (i64 i = 0; i < vocabulary; i++) {
                const float e = fast_exp(2.0f * (get(l[i]) * scale / cap));
                put(l[i], cap * ((e - 1.0f) / (e + 1.0f)));
            }
        } else if (scale != 1.0f) {
#pragma omp simd
            for (i64 i = 0; i < vocabulary; i++) put(l[i], get(l[i]) * scale);
        }
        float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
        for (i64 i = 0; i < vocabulary; i++) largest = get(l[i]) > largest ? get(l[i]) : largest;
#pragma omp simd reduction(+ : total)
        for (i64 i = 0; i < vocabulary; i++) total += fast_exp(get(l[i]) - largest);
        const float picked = get(l[target]);
        losses[row] = std::log(total) + largest - picked;
        if (!gradient) continue;
        const float each = 1.0f / total, bend = cap > 0 ? 1.0f / (cap * cap) : 0.0f;
        const float own = fast_exp(picked - largest) * each - 1.0f;
#pragma omp simd
        for (i64 i = 0; i < vocabulary; i++) {
            const float v = get(l[i]);
            put(l[i], fast_exp(v - largest) * each * (1.0f - v * v * bend) * scale);
        }
        put(l[target], own * (1.0f - picked * picked * bend) * scale);
    }
}

// of y = x gain, a gain a column: scaled = grad gain, and each column's sum of grad y. By columns: the sums do not hang on the threads
template <typename T>
void scale_columns_backward(i64 rows, i64 width, const T* grad, const T* y, const float* gain, T* scaled, float* sums,
                            int threads) {
    constexpr i64 COLUMNS = 128;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 first = 0; first < width; first += COLUMNS) {
        const i64 count = width - first < COLUMNS ? width - first : COLUMNS;
        float total[COLUMNS] = {};
        for (i64 row = 0; row < rows; row++) {
            const T *g = grad + row * width + first, *o = y + row * width + first;
            T* to = scaled + row * width + first;
#pragma omp simd
            for (i64 i = 0; i < count; i++) {
                const float pull = get(g[i]);
                total[i] += pull * get(o[i]);
                put(to[i], pull * gain[first + i]);
            }
        }
        std::memcpy(sums + first, total, count * 4);
    }
}

}  // namespace

extern "C" {

void ftrun_scale_columns_backward(int half, i64 rows, i64 width, const void* grad, const void* y, const float* gain,
                                  void* scaled, float* sums, int threads) {
    if (half) scale_columns_backward(rows, width, (const bf16*)grad, (const bf16*)y, gain, (bf16*)scaled, sums, threads);
    else scale_columns_backward(rows, width, (const float*)grad, (const float*)y, gain, (float*)scaled, sums, threads);
}


void ftrun_rms_norm(int half, i64 rows, i64 width, const void* x, const void* w, float eps, int form, void* y,
                    float* rstd, int threads) {
    if (half) rms_norm(rows, width, (const bf16*)x, (const bf16*)w, eps, form, (bf16*)y, rstd, threads);
    else rms_norm(rows, width, (const float*)x, (const float*)w, eps, form, (float*)y, rstd, threads);
}

void ftrun_rms_norm_backward(int half, i64 rows, i64 width, const void* g, const void* x, const void* w,
                             const float* rstd, int plus_one, void* dx, int threads) {
    if (half) rms_norm_backward(rows, width, (const bf16*)g, (const bf16*)x, (const bf16*)w, rstd, plus_one, (bf16*)dx, threads);
    else rms_norm_backward(rows, width, (const float*)g, (const float*)x, (const float*)w, rstd, plus_one, (float*)dx, threads);
}

// act: 0 silu, 1 gelu by tanh
void ftrun_gated(int half, int act, i64 rows, i64 width, i64 stride, const void* gate, const void* up, void* out, int threads) {
    if (half && act == 0) gated<bf16, Silu>(rows, width, stride, (const bf16*)gate, (const bf16*)up, (bf16*)out, threads);
    else if (half) gated<bf16, GeluTanh>(rows, width, stride, (const bf16*)gate, (const bf16*)up, (bf16*)out, threads);
    else if (act == 0) gated<float, Silu>(rows, width, stride, (const float*)gate, (const float*)up, (float*)out, threads);
    else gated<float, GeluTanh>(rows, width, stride, (const float*)gate, (const float*)up, (float*)out, threads);
}

void ftrun_gated_backward(int half, int act, i64 rows, i64 width, i64 stride, const void* grad, const void* gate,
                          const void* up, void* dgate, void* dup, int threads) {
    if (half && act == 0)
        gated_backward<bf16, Silu>(rows, width, stride, (const bf16*)grad, (const bf16*)gate, (const bf16*)up, (bf16*)dgate, (bf16*)dup, threads);
    else if (half)
        gated_backward<bf16, GeluTanh>(rows, width, stride, (const bf16*)grad, (const bf16*)gate, (const bf16*)up, (bf16*)dgate, (bf16*)dup, threads);
    else if (act == 0)
        gated_backward<float, Silu>(rows, width, stride, (const float*)grad, (const float*)gate, (const float*)up, (float*)dgate, (float*)dup, threads);
    else
        gated_backward<float, GeluTanh>(rows, width, stride, (const float*)grad, (const float*)gate, (const float*)up, (float*)dgate, (float*)dup, threads);
}

void ftrun_rope(int half, i64 tokens, i64 heads, i64 size, i64 turned, const void* x, i64 x_token, i64 x_head,
                const void* cosine, const void* sine, void* out, i64 out_token, i64 out_head, int back, int threads) {
    if (half)
        rope(tokens, heads, size, turned, (const bf16*)x, x_token, x_head, (const bf16*)cosine, (const bf16*)sine, (bf16*)out, out_token, out_head, back, threads);
    else
        rope(tokens, heads, size, turned, (const float*)x, x_token, x_head, (const float*)cosine, (const float*)sine, (float*)out, out_token, out_head, back, threads);
}

void ftrun_cross_entropy(int half, i64 rows, i64 vocabulary, void* logits, const i64* targets, float scale, float cap,
                         int gradient, float* losses, int threads) {
    if (half) cross_entropy(rows, vocabulary, (bf16*)logits, targets, scale, cap, gradient, losses, threads);
    else cross_entropy(rows, vocabulary, (float*)logits, targets, scale, cap, gradient, losses, threads);
}
}
