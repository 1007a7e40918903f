# Finds nvcc, before enable_language(CUDA): an explicit -DCMAKE_CUDA_COMPILER or $CUDACXX wins, then the CUDA wheels of
# the Python that runs the build (site-packages/nvidia/cu13), then what CMake finds (nvcc on PATH, /usr/local/cuda).
if(DEFINED CMAKE_CUDA_COMPILER OR DEFINED ENV{CUDACXX})
  return()
endif()

jax_ep_ask_python(_wheels [[
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
for path in spec.submodule_search_locations if spec else []:
    root = pathlib.Path(path) / "cu13"
    if (root / "bin/nvcc").is_file() and (root / "include/cuda_runtime.h").is_file():
        print(root)
        break
]])
if(NOT _wheels)
  return()
endif()

# nvcc's profile looks for lib64, FindCUDAToolkit for libcudart.so: the wheels have lib and libcudart.so.13. Links make
# up for it. bin and lib are directories of links, not links: nvcc finds its root from the path it is started by.
set(_root "${CMAKE_BINARY_DIR}/cuda")
file(REMOVE_RECURSE "${_root}")    # an isolated build's Python is elsewhere each time
foreach(_directory include nvvm)
  file(MAKE_DIRECTORY "${_root}")
  file(CREATE_LINK "${_wheels}/${_directory}" "${_root}/${_directory}" SYMBOLIC)
endforeach()
foreach(_directory bin lib)
  file(MAKE_DIRECTORY "${_root}/${_directory}")
  file(GLOB _files "${_wheels}/${_directory}/*")
  foreach(_file IN LISTS _files)
    get_filename_component(_name "${_file}" NAME)
    file(CREATE_LINK "${_file}" "${_root}/${_directory}/${_name}" SYMBOLIC)
  endforeach()
endforeach()
file(CREATE_LINK libcudart.so.13 "${_root}/lib/libcudart.so" SYMBOLIC)
file(CREATE_LINK lib "${_root}/lib64" SYMBOLIC)

set(CMAKE_CUDA_COMPILER "${_root}/bin/nvcc" CACHE FILEPATH "nvcc of the CUDA wheels" FORCE)
set(CUDAToolkit_ROOT "${_root}" CACHE PATH "CUDA wheels" FORCE)
message(STATUS "CUDA from wheels: ${_wheels}")
