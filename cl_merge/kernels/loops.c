/* The inner loops of merging, each in one pass over memory.

   torch needs several operations for what is one loop here. Every function gives the same bits as
   the torch code that it stands in for, which stays as the fallback; a test compares the two. The
   file is compiled without the contraction of products and sums, which would round differently. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Function versions for wider vectors, chosen when the file is loaded. They do not change a bit: none
   of them fuses operations or reorders sums of floats. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
/* Random numbers need its products of 64 bits, for which older compilers cannot choose a version. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDEST "arch=x86-64-v4"
#else
#define WIDEST "avx512f"
#endif
#define LOOP __attribute__((target_clones(WIDEST, "avx2", "default")))
#endif
#elif defined(_WIN32)
#define LOOP __declspec(dllexport)
#endif
#ifndef LOOP
#define LOOP
#endif

/* Python's linkers ask for it; the file is loaded with ctypes and never imported. */
#ifdef _WIN32
__declspec(dllexport)
#endif
void *PyInit__loops(void) { return 0; }

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

/* Each loop over a task vector exists three times: for the vector itself, and for fine-tuned weights
   and their base in two dtypes, whose difference is taken on the way. The latter two return whether
   all of the vector is finite. */

#define FINITE(value)                                   \
  uint32_t magnitude = bits_of(value) & MAGNITUDE;      \
  largest = magnitude > largest ? magnitude : largest;

#define FOR_EACH_DTYPE(NAME, PARAMETERS, BODY)                                                      \
  LOOP void NAME(PARAMETERS const float *restrict vector, int64_t n) {                                   \
    for (int64_t i = 0; i < n; i++) {                                                               \
      float value = vector[i];                                                                      \
      BODY                                                                                          \
    }                                                                                               \
  }                                                                                                 \
  LOOP int NAME##_float32(PARAMETERS const float *restrict tuned, const float *restrict base,            \
                     int64_t n) {                                                                   \
    uint32_t largest = 0;                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                               \
      float value = tuned[i] - base[i];                                                             \
      FINITE(value)                                                                                 \
      BODY                                                                                          \
    }                                                                                               \
    return largest < INFINITE;                                                                      \
  }                                                                                                 \
  LOOP int NAME##_bfloat16(PARAMETERS const uint16_t *restrict tuned, const uint16_t *restrict base,     \
                      int64_t n) {                                                                  \
    uint32_t largest = 0;                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                               \
      float value = bfloat16(tuned[i]) - bfloat16(base[i]);                                         \
      FINITE(value)                                                                                 \
      BODY                                                                                          \
    }                                                                                               \
    return largest < INFINITE;                                                                      \
  }

#define COMMA ,

/* out = tuned - base */
FOR_EACH_DTYPE(difference, float *restrict out COMMA, out[i] = value;)

/* sum = sum + vector */
FOR_EACH_DTYPE(fold_sum, float *restrict sum COMMA, sum[i] += value;)

/* merged = vector where its magnitude is as large or larger */
FOR_EACH_DTYPE(fold_largest, float *restrict merged COMMA,
               merged[i] = fabsf(value) >= fabsf(merged[i]) ? value : merged[i];)

/* merged = vector where the random number of the element is at most `limit`: SplitMix64 by counter,
   without its lowest bit */
static inline uint64_t drawn(uint64_t key, uint64_t counter) {
  uint64_t bits = key + (counter + 1) * 0x9E3779B97F4A7C15u;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return (bits ^ (bits >> 31)) >> 1;
}

FOR_EACH_DTYPE(fold_drawn,
               float *restrict merged COMMA uint64_t key COMMA uint64_t start COMMA uint64_t limit COMMA,
               merged[i] = drawn(key, start + (uint64_t)i) <= limit ? value : merged[i];)

/* Sums and counts, by sign, of the values whose magnitude reaches the threshold */
FOR_EACH_DTYPE(fold_signed,
               float *restrict positive_sum COMMA float *restrict negative_sum COMMA
               int16_t *restrict positive_count COMMA int16_t *restrict negative_count COMMA
               float threshold COMMA,
               value = fabsf(value) >= threshold ? value : 0.0f;
               positive_sum[i] += value > 0.0f ? value : 0.0f;
               negative_sum[i] += value < 0.0f ? value : 0.0f;
               positive_count[i] += value > 0.0f;
               negative_count[i] += value < 0.0f;)

/* Of the sums by sign: how many totals are positive less how many are negative; tells whether any
   total is zero although there are values. */
LOOP int64_t count_signs(const float *restrict positive_sum, const float *restrict negative_sum,
                    const int16_t *restrict positive_count, int64_t n, int *restrict cancelled) {
  int64_t balance = 0;
  int32_t cancels = 0;
  for (int64_t i = 0; i < n; i++) {
    float total = positive_sum[i] + negative_sum[i];
    balance += (total > 0.0f) - (total < 0.0f);
    cancels |= (total == 0.0f) & (positive_count[i] > 0);
  }
  *cancelled = cancels;
  return balance;
}

/* The mean of the values of the elected sign; a total of zero takes the majority's. */
LOOP void elect(const float *restrict positive_sum, const float *restrict negative_sum,
           const int16_t *restrict positive_count, const int16_t *restrict negative_count,
           float *restrict out, int64_t n, float majority) {
  for (int64_t i = 0; i < n; i++) {
    float total = positive_sum[i] + negative_sum[i];
    float elected = total == 0.0f ? majority : total;
    int32_t positives = positive_count[i], negatives = negative_count[i];
    int32_t count = elected > 0.0f ? positives : negatives;
    float sum = elected > 0.0f ? positive_sum[i] : negative_sum[i];
    float mean = sum / (float)(count < 1 ? 1 : count);
    out[i] = elected == 0.0f ? 0.0f : mean;
  }
}

/* Of a block of magnitudes, of which some are neither below `low` nor above `high`: count those at the
   ends and collect those between. They are rare, so that groups without any are passed over. `between`
   has room for a block more; returns how many it holds then. */
enum { BLOCK = 64, GROUP = 8 };

static inline int64_t collect(const float *restrict block, float low, float high,
                              float *restrict between, int64_t found, int64_t *restrict counts) {
  int32_t at_low = 0, at_high = 0, inside[BLOCK / GROUP];
  for (int group = 0; group < BLOCK / GROUP; group++) {
    int32_t in = 0;
    for (int i = 0; i < GROUP; i++) {
      float magnitude = block[group * GROUP + i];
      at_low += magnitude == low;
      at_high += magnitude == high;
      in += (magnitude > low) & (magnitude < high);
    }
    inside[group] = in;
  }
  counts[1] += at_low;
  counts[2] += at_high;
  for (int group = 0; group < BLOCK / GROUP; group++) {
    if (!inside[group]) continue;
    for (int i = 0; i < GROUP; i++) {
      float magnitude = block[group * GROUP + i];
      between[found] = magnitude; /* and the next one goes over it, unless this one counts */
      found += (magnitude > low) & (magnitude < high);
    }
  }
  return found;
}

/* Count the magnitudes below `low`, at `low` and at `high`, and collect those between; returns how many
   are collected, or -1 if they are more than there is room for. Last in `counts` is whether all values
   are finite. */
#define LOOK(LENGTH, VALUE)                                                                         \
  for (int64_t i = 0; i < (LENGTH); i++) {                                                          \
    float value = VALUE;                                                                            \
    FINITE(value)                                                                                   \
    block[i] = fabsf(value);                                                                        \
    under += block[i] < low;                                                                        \
    over += block[i] > high;                                                                        \
  }

#define BRACKET(NAME, INPUTS, VALUE)                                                                \
  LOOP int64_t NAME(INPUTS, int64_t n, float low, float high, float *restrict between, int64_t room,     \
               int64_t *restrict counts) {                                                          \
    float block[BLOCK];                                                                             \
    uint32_t largest = 0;                                                                           \
    int64_t found = 0;                                                                              \
    counts[0] = counts[1] = counts[2] = 0;                                                          \
    for (int64_t begin = 0; begin < n && found <= room; begin += BLOCK) {                           \
      int64_t length = n - begin < BLOCK ? n - begin : BLOCK;                                       \
      int32_t under = 0, over = 0;                                                                  \
      if (length == BLOCK) {                                                                        \
        LOOK(BLOCK, VALUE)                                                                          \
      } else {                                                                                      \
        LOOK(length, VALUE)                                                                         \
        for (int64_t i = length; i < BLOCK; i++) block[i] = -1.0f; /* which is nowhere */           \
      }                                                                                             \
      counts[0] += under;                                                                           \
      if (under + over < length)                                                                    \
        found = collect(block, low, high, between, found, counts);                          \
    }                                                                                               \
    counts[3] = largest < INFINITE;                                                                 \
    return found <= room ? found : -1;                                                              \
  }

BRACKET(bracket, const float *restrict vector, vector[begin + i])
BRACKET(bracket_float32, const float *restrict tuned COMMA const float *restrict base,
        tuned[begin + i] - base[begin + i])
BRACKET(bracket_bfloat16, const uint16_t *restrict tuned COMMA const uint16_t *restrict base,
        bfloat16(tuned[begin + i]) - bfloat16(base[begin + i]))
