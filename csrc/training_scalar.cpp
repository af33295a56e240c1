#include "training_lanes.h"

namespace deepseek {
const TrainingKernels* const scalar_training = &training;
}  // namespace deepseek
