// Which table of kernels this process uses, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "training.h"

namespace deepseek {
namespace {

#if defined(DEEPSEEK_EMULATE_AMX)
bool tiles_allowed() { return true; }
#elif defined(__linux__) && defined(__x86_64__)
// Tiles have to be there and asked for: Linux hands their state out to processes that request it.
bool tiles_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool tiles_allowed() { return false; }
#endif

}  // namespace

bool runs_here(const Kernels* table) {
  if (!table) return false;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (table == amx_kernels && !tiles_allowed()) return false;
  if (table == avx512_kernels || table == amx_kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  if (table == avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

namespace {

const Kernels& choose() {
  const Kernels* best_first[] = {amx_kernels, avx512_kernels, avx2_kernels, scalar_kernels};
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

namespace {

// Whether this machine has the BF16 units of a table, beside what its instruction set needs.
bool has_units(const Products* units) {
  if (!units) return false;
#if defined(DEEPSEEK_EMULATE_AMX)
  return true;
#elif defined(__x86_64__)
  unsigned a, b, c, d;
  if (units == amx_bf16_products) return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
#else
  return false;
#endif
}

const Products* choose_units() {
  const bool tiles = &kernels() == amx_kernels;
  if (tiles && has_units(amx_bf16_products)) return amx_bf16_products;
  return (tiles || &kernels() == avx512_kernels) && has_units(avx512_bf16_products) ? avx512_bf16_products : nullptr;
}

bool units_on = true;

}  // namespace

const Products* bf16_units() {
  static const Products* const units = choose_units();
  return units;
}

const Products* bf16_products() { return units_on ? bf16_units() : nullptr; }

void use_bf16_units(bool on) { units_on = on; }

const TrainingKernels& training_kernels() {
  if (&kernels() == avx512_kernels || &kernels() == amx_kernels) return *avx512_training;
  return &kernels() == avx2_kernels ? *avx2_training : *scalar_training;
}

}  // namespace deepseek
