// Which table of kernels this process uses, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

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

}  // namespace deepseek
