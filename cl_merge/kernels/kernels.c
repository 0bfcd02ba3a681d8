/* The inner loops of merging, each in one pass over memory.

   torch needs several operations for what is one loop here. Every function gives the same bits as
   the torch code that it stands in for, which stays as the fallback; a test compares the two. The
   file is compiled without the contraction of products and sums, which would round differently. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bfloat16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* out = tuned - base; returns whether all of it is finite. */
int difference_float32(const float *restrict tuned, const float *restrict base,
                       float *restrict out, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    float value = tuned[i] - base[i];
    uint32_t magnitude = bits_of(value) & MAGNITUDE;
    out[i] = value;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < INFINITE;
}

int difference_bfloat16(const uint16_t *restrict tuned, const uint16_t *restrict base,
                        float *restrict out, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    float value = bfloat16(tuned[i]) - bfloat16(base[i]);
    uint32_t magnitude = bits_of(value) & MAGNITUDE;
    out[i] = value;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < INFINITE;
}

/* merged = vector where its magnitude is as large or larger. */
void fold_largest(float *restrict merged, const float *restrict vector, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    merged[i] = fabsf(vector[i]) >= fabsf(merged[i]) ? vector[i] : merged[i];
}

/* merged = vector where the random number of the element is at most `limit`: SplitMix64 by counter,
   without its lowest bit. */
void fold_drawn(float *restrict merged, const float *restrict vector, int64_t n, uint64_t key,
                uint64_t start, uint64_t limit) {
  for (int64_t i = 0; i < n; i++) {
    uint64_t bits = key + (start + (uint64_t)i + 1) * 0x9E3779B97F4A7C15u;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits = (bits ^ (bits >> 31)) >> 1;
    merged[i] = bits <= limit ? vector[i] : merged[i];
  }
}

/* Sums and counts, by sign, of the values whose magnitude reaches the threshold. */
void fold_signed(float *restrict positive_sum, float *restrict negative_sum,
                 int16_t *restrict positive_count, int16_t *restrict negative_count,
                 const float *restrict vector, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; i++) {
    float value = fabsf(vector[i]) >= threshold ? vector[i] : 0.0f;
    positive_sum[i] += value > 0.0f ? value : 0.0f;
    negative_sum[i] += value < 0.0f ? value : 0.0f;
    positive_count[i] += value > 0.0f;
    negative_count[i] += value < 0.0f;
  }
}

/* Collect the magnitudes from `low` to `high`; returns how many there are, or -1 if they are more than
   there is room for, and tells how many lie below. `inside` has one place more than `room`. */
int64_t bracket(const float *restrict vector, int64_t n, float low, float high,
                float *restrict inside, int64_t room, int64_t *restrict below) {
  enum { BLOCK = 32 };
  int64_t found = 0, less = 0, begin = 0;
  for (; begin + BLOCK <= n; begin += BLOCK) {
    int32_t lower = 0, higher = 0;
    for (int64_t i = begin; i < begin + BLOCK; i++) {
      float magnitude = fabsf(vector[i]);
      lower += magnitude < low;
      higher += magnitude > high;
    }
    less += lower;
    if (lower + higher == BLOCK) continue;
    if (found + BLOCK > room) return -1;
    for (int64_t i = begin; i < begin + BLOCK; i++) {
      float magnitude = fabsf(vector[i]);
      inside[found] = magnitude; /* and the next one goes over it, unless this one counts */
      found += (magnitude >= low) & (magnitude <= high);
    }
  }
  for (; begin < n; begin++) {
    float magnitude = fabsf(vector[begin]);
    less += magnitude < low;
    if (magnitude < low || magnitude > high) continue;
    if (found == room) return -1;
    inside[found++] = magnitude;
  }
  *below = less;
  return found;
}
