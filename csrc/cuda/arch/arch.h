// The thin layer under every CUDA kernel: one function per instruction, PTX under nvcc and its meaning under g++.
#pragma once

#include "launch.h"
#include "math.h"
#include "memory.h"
#include "mma.h"
#include "platform.h"
#include "sync.h"
