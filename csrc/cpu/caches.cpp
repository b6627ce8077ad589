#include "cpu/caches.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace halfbin {
namespace {

size_t Ask() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return static_cast<size_t>(bytes);
#endif
  return size_t{1} << 20;
}

}  // namespace

size_t SecondCacheBytes() {
  static const size_t bytes = Ask();
  return bytes;
}

}  // namespace halfbin
