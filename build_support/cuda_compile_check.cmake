# Compiles every CUDA source for several GPUs with warnings as errors, and holds ptxas's report on registers, shared memory and
# spills to what the kernels promise (build_support/ptxas_report.py). Run by CMakeLists.txt with NVCC, SOURCES and
# ARCHITECTURES (both separated by commas), INCLUDE_DIRECTORY and OUTPUT_DIRECTORY.
cmake_minimum_required(VERSION 3.22)

if(NOT NVCC)
  message("cuda_compile_check skipped: nvcc was not found (looked in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; "
    "-DALPHAEXT_NVCC=... names it)")
  return()
endif()
if(NOT SOURCES)
  message(FATAL_ERROR "cuda_compile_check: csrc/cuda holds no .cu file")
endif()
find_program(PYTHON NAMES python3 python)
if(NOT PYTHON)
  message(FATAL_ERROR "cuda_compile_check: python3 was not found; it reads the compiler's report")
endif()

string(REPLACE "," ";" SOURCES "${SOURCES}")
message("${NVCC} compiles ${SOURCES} for ${ARCHITECTURES}")
execute_process(
  COMMAND ${PYTHON} ${CMAKE_CURRENT_LIST_DIR}/ptxas_report.py --nvcc ${NVCC} --architectures ${ARCHITECTURES}
    --include ${INCLUDE_DIRECTORY} --output ${OUTPUT_DIRECTORY} ${SOURCES}
  RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "cuda_compile_check failed; the whole log: ${OUTPUT_DIRECTORY}/cuda_compile_check.log")
endif()
message("cuda_compile_check passed; registers, shared memory and spills: ${OUTPUT_DIRECTORY}/ptxas_report.md")
