# docker build -t sparsight . && docker run --rm -v "$PWD:/work" sparsight prune MODEL sparse --data mine.jsonl
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir "/src[demo,data]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["sparsight"]
CMD ["--help"]
