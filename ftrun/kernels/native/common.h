// What the kernels share: bfloat16 as it lies in memory, a vectorisable exp, and one way to share rows among threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using i64 = int64_t;

struct bf16 {
    uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float get(const float& value) { return value; }
static inline float get(const bf16& value) { return bits_to_float(uint32_t(value.bits) << 16); }

// to the nearest, ties to even; what is no number stays none
static inline uint32_t rounded_bits(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : nearest;
}

static inline void put(float& to, float value) { to = value; }
static inline void put(bf16& to, float value) { to.bits = uint16_t(rounded_bits(value) >> 16); }

// the value as T would hold it
template <typename T> static inline float as(float value);
template <> inline float as<float>(float value) { return value; }
template <> inline float as<bf16>(float value) { return bits_to_float(rounded_bits(value) & 0xffff0000); }

// exp to 2 units in the last place for -87 to 88, clamped beyond (Cephes' expf: Cody-Waite reduction, degree 5)
static inline float fast_exp(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float n = std::nearbyintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_to_float(uint32_t(int32_t(n) + 127) << 23);
}
