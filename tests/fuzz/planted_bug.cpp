// A target with an error that no blind search finds: it proves that the driver is guided by coverage and comparisons.

#include <cstdint>
#include <cstring>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint32_t magic, length;
  if (size < 8) return 0;
  std::memcpy(&magic, data, 4);
  std::memcpy(&length, data + 4, 4);
  if (magic != 0x4b444342 || length < 1000) return 0;
  return length == size * 3 + 1000 ? data[size] : 0;  // one byte too far
}
