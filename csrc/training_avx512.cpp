#include "training_lanes.h"

namespace deepseek {
#if defined(__AVX512VNNI__)
const TrainingKernels* const avx512_training = &training;
#else
const TrainingKernels* const avx512_training = nullptr;
#endif
}  // namespace deepseek
