// Call the classifier on the float and on the quantized file in turns.
//
//     exercise FLOAT INT8 ROWS.f32 SLICES CALLS OUT_FOLDER ROWS AXIS...
#include "serve.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>

namespace {

std::vector<float> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<float> values(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

void list(std::ostream& out, const char* key, const std::vector<double>& values) {
  out << ", \"" << key << "\": [";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) {
    std::cerr << "exercise FLOAT INT8 ROWS.f32 SLICES CALLS OUT_FOLDER ROWS AXIS...\n";
    return 2;
  }
  const std::string names[] = {"float", "int8"};
  Classifier sides[] = {Classifier(argv[1]), Classifier(argv[2])};
  auto rows = read(argv[3]);
  const int slices = std::atoi(argv[4]), calls = std::atoi(argv[5]);
  const std::string folder = argv[6];
  const size_t count = std::strtoull(argv[7], nullptr, 10), size = rows.size() / count;
  std::vector<int64_t> shape{1};
  for (int i = 8; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  auto row = [&](size_t index) { return rows.data() + index % count * size; };

  for (int side = 0; side < 2; ++side) {
    std::ofstream out(folder + "/" + names[side] + ".f32", std::ios::binary);
    for (size_t index = 0; index < count; ++index) {
      auto scores = sides[side](row(index), shape);
      out.write(reinterpret_cast<const char*>(scores.data()), static_cast<std::streamsize>(scores.size() * 4));
    }
  }

  std::vector<double> times[2];
  for (int turn = 0; turn < slices; ++turn) {
    for (int half = 0; half < 2; ++half) {
      const int side = turn % 2 ? half : 1 - half;
      sides[side](row(0), shape);  // brings its weights back into the caches
      std::vector<double> taken;
      for (int call = 0; call < calls; ++call) {
        const auto began = std::chrono::steady_clock::now();
        sides[side](row(static_cast<size_t>(call)), shape);
        taken.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count());
      }
      std::nth_element(taken.begin(), taken.begin() + calls / 2, taken.end());
      times[side].push_back(taken[static_cast<size_t>(calls / 2)]);
    }
  }
  std::ofstream out(folder + "/times.json");
  out << "{\"runtime\": \"C++ on libonnxruntime " << OrtGetApiBase()->GetVersionString() << ", headers 1."
      << ORT_API_VERSION << "\"";
  list(out, "float_ms", times[0]);
  list(out, "int8_ms", times[1]);
  out << "}\n";
  return out ? 0 : 1;
}
