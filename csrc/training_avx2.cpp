#include "training_lanes.h"

namespace deepseek {
#if defined(__AVX2__) && defined(__FMA__)
const TrainingKernels* const avx2_training = &training;
#else
const TrainingKernels* const avx2_training = nullptr;
#endif
}  // namespace deepseek
