// The part of DLPack 1.x's C interface for exchanging tensors with Python objects that metate uses
// (dmlc/dlpack, dlpack.h: `__dlpack_c_exchange_api__`). torch's own copy hides from users of the stable ABI.
#pragma once

#include <stdint.h>

namespace metate::dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu = 1;                                                                     // a device type
constexpr uint8_t integer = 0, natural = 1, floating = 2, bfloat = 4, truth = 6, e4m3fn = 10;  // numbers

struct Tensor {
    void* data;
    struct {
        int32_t type, index;
    } device;
    int32_t dims;
    struct {
        uint8_t kind, bits;
        uint16_t lanes;
    } dtype;
    int64_t *sizes, *strides;
    uint64_t byte_offset;
};

struct Version {
    uint32_t major, minor;
};

struct ManagedTensor {
    Version version;
    void* owner;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct Exchange {
    Version version;
    Exchange* older;
    int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, SetError);
    int (*managed_from_object)(void* object, ManagedTensor** out);
    int (*object_from_managed)(ManagedTensor* stolen, void** out_object);
    int (*tensor_from_object)(void* object, Tensor* out);  // borrows; may be absent
    int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace metate::dlpack
