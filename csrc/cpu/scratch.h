// Memory that a thread keeps between calls, so that the system need not map and clear it each time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace halfbin {

// Bytes aligned to 64; what they hold is anybody's guess. The same memory at every call of a thread, unless more is asked for.
inline uint8_t* Scratch(size_t bytes) {
  struct Free {
    void operator()(uint8_t* memory) const { operator delete(memory, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory.reset(static_cast<uint8_t*>(operator new(bytes, std::align_val_t(64))));
    size = bytes;
  }
  return memory.get();
}

}  // namespace halfbin
