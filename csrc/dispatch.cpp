// Which table of kernels this process uses, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace deepseek {
namespace {

bool runs_here(const Kernels* table) {
  if (!table) return false;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (table == avx512_kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  if (table == avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Kernels& choose() {
  const Kernels* best_first[] = {avx512_kernels, avx2_kernels, scalar_kernels};
  const char* forced = std::getenv("DEEPSEEK_ISA");
  std::string known;
  for (const Kernels* table : best_first) {
    if (!runs_here(table)) continue;
    if (!forced || !*forced || std::string(forced) == table->name) return *table;
    known += std::string(known.empty() ? "" : ", ") + table->name;
  }
  throw std::runtime_error("DEEPSEEK_ISA = '" + std::string(forced) + "': this machine and build have " + known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace deepseek
