// What the kernel uses of XLA's C interface for custom calls (xla/ffi/api/c_api.h).
//
// Declared here, as building must not take JAX. The layout is that of versions 0.2 and 0.3 (JAX
// 0.8.1 to 0.10). When a custom call is registered XLA asks for its version, and refuses one that it
// does not support.

#pragma once

#include <cstddef>
#include <cstdint>

namespace xla {

constexpr int MAJOR = 0, OLDEST_MINOR = 2, MINOR = 3;
constexpr int METADATA = 1, EXECUTE = 3, RESOURCE_EXHAUSTED = 8, F16 = 10, BF16 = 16;

struct Error;    // null: none
struct Context;  // of one execution
struct Future;

struct Extension {
    size_t struct_size;
    int type;
    Extension *next;
};

struct Version {
    size_t struct_size;
    Extension *extensions;
    int major_version, minor_version;
};

struct Buffer {
    size_t struct_size;
    Extension *extensions;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
};

struct Buffers {
    size_t struct_size;
    Extension *extensions;
    int64_t size;
    int *types;
    Buffer **each;
};

struct Scalar {
    int dtype;
    void *value;
};

struct Attributes {  // in the order of their names
    size_t struct_size;
    Extension *extensions;
    int64_t size;
    int *types;
    void *names;
    Scalar **each;
};

struct NewError {
    size_t struct_size;
    Extension *extensions;
    const char *message;
    int code;
};

struct OldError {
    size_t struct_size;
    Extension *extensions;
    Error *error;
};

struct Task {
    size_t struct_size;
    Extension *extensions;
    Context *context;
    void (*run)(void *data);
    void *data;
};

struct Threads {
    size_t struct_size;
    Extension *extensions;
    Context *context;
    int64_t *number;
};

struct Frame;
struct Registration;

struct Api {
    size_t struct_size;
    Extension *extensions;
    Version version;
    const void *internal;
    Error *(*create_error)(NewError *);
    void (*message_of_error)(void *);
    void (*destroy_error)(OldError *);
    Error *(*register_handler)(Registration *);
    void *others[7];
    Error *(*schedule)(Task *);
    Error *(*number_of_threads)(Threads *);
};

struct Text {
    const char *data;
    size_t size;
};

struct Registration {
    size_t struct_size;
    Extension *extensions;
    Text name, platform;
    void *instantiate, *prepare, *initialize;
    Error *(*execute)(Frame *);
    uint32_t traits;
};

struct Frame {
    size_t struct_size;
    Extension *extensions;
    const Api *api;
    Context *context;
    int stage;
    Buffers arguments, results;
    Attributes attributes;
    Future *future;
};

struct Metadata {
    size_t struct_size;
    Version version;
    uint32_t traits;
    int64_t state;
};

struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};

}  // namespace xla
