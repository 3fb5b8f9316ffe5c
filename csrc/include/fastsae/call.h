// What every launcher of csrc/cuda is told besides its operands: where to run, and what to say if
// that fails. No CUDA header: the bindings are plain C++.
#pragma once

#include <cstdint>
#include <string>

namespace fastsae {
namespace cuda {

struct Size {
  const char* name;
  int64_t value;
};

struct Where {
  int device;
  void* stream;
};

struct Call {
  const char* op;
  int device;
  void* stream;
  Size sizes[5];  // those without a name are not there
};

inline Call call_of(const char* op, Where where, Size a, Size b = {}, Size c = {}, Size d = {},
                    Size e = {}) {
  return {op, where.device, where.stream, {a, b, c, d, e}};
}

inline std::string describe(const Call& call) {
  std::string text = std::string("fastsae: CUDA ") + call.op + " with";
  for (const Size& size : call.sizes)
    if (size.name) text += std::string(" ") + size.name + "=" + std::to_string(size.value);
  return text;
}

}  // namespace cuda
}  // namespace fastsae
