// A kernel that is written once, compiled for every instruction set.
//
// Define FW_KERNEL, the kernel's file as seen from here, and include this inside the op's own namespace. The kernel may
// use all of lanes.hpp. FW_AT_LEVEL(name) is then its function of that name for the instruction set in use.

namespace portable {
#include "lanes.hpp"
#include FW_KERNEL
}  // namespace portable

#ifdef FW_X86
FW_PUSH(FW_AVX2)
namespace two {
#include "lanes.hpp"
#include FW_KERNEL
}  // namespace two
FW_END
FW_PUSH(FW_AVX512)
#define FW_WIDE
namespace wide {
#include "lanes.hpp"
#include FW_KERNEL
}  // namespace wide
#undef FW_WIDE
FW_END
#define FW_AT_LEVEL(name) \
  (fw::level() == fw::VNNI ? wide::name : fw::level() == fw::TWO ? two::name : portable::name)
#else
#define FW_AT_LEVEL(name) portable::name
#endif
