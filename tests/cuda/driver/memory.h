// Device memory of the fake driver: every allocation is tracked and is surrounded by two red zones.
#pragma once

#include "emulated.h"

#include <string>

namespace memory {
// Sets the capacity: ELBO_EMULATED_MEMORY in bytes, or the 80 GB of an H100.
void configure();
size_t capacity();
size_t used();
// The peak use since the start or the last reset.
size_t high();
void reset_high();
// Returns zero if the capacity is too small. The content is NaN in every float type.
uint64_t allocate(size_t bytes);
// `retire` ends an allocation for the program (false if there is none), `release` then frees its memory.
bool retire(uint64_t device);
void release(uint64_t device);
bool is_device(uint64_t address);
// Host address of a kernel's pointer argument. Aborts unless it points into (or just behind) a live allocation.
void* argument(uint64_t device, size_t alignment, const char* kernel, int index);
// Aborts if a kernel wrote beyond the allocation that `device` points into.
void check_red_zones(uint64_t device, const std::string& what);
}  // namespace memory
