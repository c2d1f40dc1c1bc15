# Compiles every CUDA source for several GPUs with warnings as errors; ptxas's report on registers, shared memory and
# spills goes to a log. Run by CMakeLists.txt with NVCC, SOURCES and ARCHITECTURES (both separated by commas),
# INCLUDE_DIRECTORY and OUTPUT_DIRECTORY.
cmake_minimum_required(VERSION 3.22)

if(NOT NVCC)
  message("cuda_compile_check skipped: nvcc was not found (looked in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; "
    "-DALPHAEXT_NVCC=... names it)")
  return()
endif()
if(NOT SOURCES)
  message(FATAL_ERROR "cuda_compile_check: csrc/sources.txt lists no .cu file")
endif()

string(REPLACE "," ";" SOURCES "${SOURCES}")
string(REPLACE "," ";" ARCHITECTURES "${ARCHITECTURES}")
set(architecture_flags "")
set(targets " for")
foreach(architecture IN LISTS ARCHITECTURES)
  string(APPEND targets " sm_${architecture}")
  list(APPEND architecture_flags "-gencode=arch=compute_${architecture},code=sm_${architecture}")
endforeach()

file(MAKE_DIRECTORY ${OUTPUT_DIRECTORY})
set(log ${OUTPUT_DIRECTORY}/cuda_compile_check.log)
execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE version ERROR_VARIABLE version)
file(WRITE ${log} "${NVCC}\n${version}")
string(REGEX MATCH "release [0-9.]+" release "${version}")
foreach(source IN LISTS SOURCES)
  get_filename_component(name ${source} NAME_WE)
  message("${NVCC} (${release}) compiles ${source}${targets}")
  execute_process(
    COMMAND ${NVCC} -std=c++17 -O3 --threads=0 ${architecture_flags} -DALPHAEXT_WITH_CUDA=1 -I${INCLUDE_DIRECTORY}
      --expt-relaxed-constexpr -Werror=all-warnings -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror -Xptxas=-v
      -c ${source} -o ${OUTPUT_DIRECTORY}/${name}.o
    RESULT_VARIABLE result OUTPUT_VARIABLE printed ERROR_VARIABLE printed)
  file(APPEND ${log} "\n==== ${source}\n${printed}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "cuda_compile_check: ${source} does not compile without warnings:\n${printed}")
  endif()
endforeach()
message("cuda_compile_check passed; ptxas's report: ${log}")
