// A classifier in C++: one session, made once, called for every request.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <string>
#include <vector>

class Classifier {
 public:
  explicit Classifier(const std::string& model) : session_(environment(), model.c_str(), options()) {
    Ort::AllocatorWithDefaultOptions allocator;
    input_ = session_.GetInputNameAllocated(0, allocator).get();
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
  }

  // Scores of one row. `shape` begins with the batch, 1.
  std::vector<float> operator()(float* row, const std::vector<int64_t>& shape) {
    size_t size = 1;
    for (int64_t axis : shape) size *= static_cast<size_t>(axis);
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = Ort::Value::CreateTensor<float>(memory, row, size, shape.data(), shape.size());
    const char* inputs[] = {input_.c_str()};
    const char* outputs[] = {output_.c_str()};
    auto found = session_.Run(Ort::RunOptions{nullptr}, inputs, &tensor, 1, outputs, 1);
    const float* scores = found[0].GetTensorData<float>();
    return {scores, scores + found[0].GetTensorTypeAndShapeInfo().GetElementCount()};
  }

 private:
  static Ort::Env& environment() {
    static Ort::Env shared(ORT_LOGGING_LEVEL_WARNING, "classifier");
    return shared;
  }

  static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    return options;
  }

  Ort::Session session_;
  std::string input_, output_;
};
