#pragma once

#include <napi.h>

namespace uniflow::bindings {

void define_ops(Napi::Object exports);         // ops.cpp: every op that makes a tensor from tensors
void define_training(Napi::Object exports);    // training.cpp: backward passes, losses, the optimizer, statistics
void define_checkpoint(Napi::Object exports);  // checkpoint.cpp: safetensors files and parameters
void define_images(Napi::Object exports);      // images.cpp: decoding and resizing, on the host pool
void define_shard(Napi::Object exports);       // shard.cpp: 16-bit storage and statistics for shards
void define_device(Napi::Object exports);      // device.cpp: threads, memory, cancellation, the machine's abilities

}  // namespace uniflow::bindings
